"""Concept-aware fine-tuning (paper 1) against separate cross-entropies, by hand."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from lightning_peft.models import CausalLM
from lightning_peft.objectives import (
    AuxiliaryHeadPretrainingCausalLM,
    ConceptAwareCausalLM,
    ConceptAwareFineTuning,
    TrunkState,
)
from lightning_peft.objectives.auxiliary_heads import head_labels, load_heads, save_heads
from lightning_peft.roles import final_norm, transformer_blocks
from lightning_peft.schedules import coefficient
from tests.models.test_causal_lm import batch_of, counts_of, gradients, quiet_trainer, rows
from tests.tiny import tiny_gpt2, tiny_llama

HEADS = 3


def trunk_of(network, inputs) -> TrunkState:
    """The last block's inputs and the final hidden state, by transformers' own record of hidden states."""
    seen = {}
    block = transformer_blocks(network)[-1][1]
    hook = block.register_forward_pre_hook(lambda m, a, k: seen.update(args=a, kwargs=dict(k)), with_kwargs=True)
    outputs = network(**inputs, output_hidden_states=True, use_cache=False)
    hook.remove()
    kwargs = {k: v for k, v in seen["kwargs"].items() if k not in ("cache", "past_key_values", "use_cache")}
    kwargs.pop("hidden_states", None)
    return TrunkState(outputs.hidden_states[-1], outputs.hidden_states[-2], seen["args"][1:], kwargs)


def expected_terms(module, batch) -> list[torch.Tensor]:
    """L_0 ... L_{n-1}: every head's logits materialised, its own mean over its own labels."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    trunk = trunk_of(module.model, inputs)
    start = trunk.penultimate if module.auxiliary_heads.head_input == "penultimate" else trunk.final
    hidden = [trunk.final]
    for head in module.auxiliary_heads:
        out = head(start, *trunk.block_args, **trunk.block_kwargs)
        hidden.append(final_norm(module.model)(out) if module.auxiliary_heads.head_norm else out)
    terms = []
    for k, state in enumerate(hidden):
        output = (
            module.model.lm_head
            if k == 0 or not hasattr(module.auxiliary_heads[k - 1], "lm_head")
            else (module.auxiliary_heads[k - 1].lm_head)
        )
        logits, labels = output(state)[:, : -(1 + k)], batch["labels"][:, 1 + k :]
        terms.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100))
    return terms


def caft(network=None, **kwargs) -> ConceptAwareCausalLM:
    options = {"heads_init": "copy", "predicted_tokens": HEADS + 1, "heads_schedule": "constant"}
    return ConceptAwareCausalLM(model=network or tiny_llama(num_hidden_layers=3), **{**options, **kwargs})


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("head_input", ["penultimate", "final"])
@pytest.mark.parametrize("head_arch", ["transformer", "linear"])
def test_loss_is_the_weighted_sum_of_separate_cross_entropies(build, head_input, head_arch):
    module = caft(build(), head_input=head_input, head_arch=head_arch, heads_coefficient=0.7)
    batch = batch_of(rows(4))
    terms = module.terms(batch, counts_of(module, batch))
    losses = expected_terms(module, batch)
    expected = losses[0] + 0.7 * sum(0.8**k * loss for k, loss in enumerate(losses) if k)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-5, atol=1e-6)
    for k in range(1, HEADS + 1):
        mean = terms.sums[f"head_{k}"] / terms.counts[f"head_{k}"]
        torch.testing.assert_close(mean, losses[k].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("separate", [True, False])
def test_norm_and_separate_unembedding(separate):
    module = caft(separate_unembedding=separate, head_norm=False, heads_coefficient=1.0)
    if separate:
        torch.nn.init.normal_(module.auxiliary_heads[1].lm_head.weight, std=0.1)
    batch = batch_of(rows(3))
    losses = expected_terms(module, batch)
    expected = sum(0.8**k * loss for k, loss in enumerate(losses))
    torch.testing.assert_close(module.terms(batch, counts_of(module, batch)).loss, expected, rtol=1e-5, atol=1e-6)


def test_schedules():
    assert coefficient("rsine", 0, 10) == 1.0
    assert coefficient("rsine", 5, 10) == pytest.approx(math.sin(math.pi / 4))
    assert coefficient("rsine", 10, 10) == 0.0
    assert coefficient("linear", 3, 10) == pytest.approx(0.3)
    assert coefficient("sine", 5, 10) == pytest.approx(math.sin(math.pi / 4))
    assert coefficient("sine_0.5", 2, 8) == pytest.approx(math.sin(math.pi / 4))
    assert coefficient("sine_0.5", 6, 8) == 1.0
    assert coefficient("constant", 9, 10) == 1.0
    for unknown in ("cosine", "sine_0", "sine_2", "sine_x", "rsine_0.5"):
        with pytest.raises(ValueError, match="heads_schedule"):
            caft(heads_schedule=unknown)


@pytest.mark.parametrize("step", [0, 5, 10])
def test_gamma_follows_the_optimizer_step(step, monkeypatch):
    module = caft(heads_schedule="rsine", heads_coefficient=1.0, finetune_heads=True)
    monkeypatch.setattr(type(module), "schedule_step", property(lambda self: step))
    monkeypatch.setattr(type(module), "schedule_steps", property(lambda self: 10))
    batch = batch_of(rows(3))
    terms = module.terms(batch, counts_of(module, batch))
    losses = expected_terms(module, batch)
    gamma = {0: 1.0, 5: math.sin(math.pi / 4), 10: 0.0}[step]
    expected = losses[0] + gamma * sum(0.8**k * loss for k, loss in enumerate(losses) if k)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-5, atol=1e-6)
    terms.loss.backward()
    if step == 10:  # pure next-token training at the end
        assert torch.equal(terms.loss, CausalLM(module.model).terms(batch, counts_of(module, batch)).loss)
        assert all(p.grad is None for p in module.auxiliary_heads.parameters())


def trajectory(tmp_path, module, steps: int = 10) -> list[torch.Tensor]:
    torch.manual_seed(1)
    loader = LookAheadDataLoader(rows(20), batch_size=2, shuffle=False, collate_fn=batch_of)
    quiet_trainer(tmp_path, max_steps=steps).fit(module, loader)
    return [p.detach().clone() for p in module.model.parameters()]


@pytest.mark.parametrize("kwargs", [{"heads_coefficient": 0.0}, {"predicted_tokens": 1}])
def test_without_the_heads_loss_it_is_plain_fine_tuning_bit_for_bit(tmp_path, kwargs):
    torch.manual_seed(0)
    plain = trajectory(tmp_path, CausalLM(tiny_llama(num_hidden_layers=3), learning_rate=1e-2))
    torch.manual_seed(0)
    ours = trajectory(tmp_path, caft(learning_rate=1e-2, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(plain, ours))


def test_exported_network_has_the_bases_keys_and_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    base = tiny_llama(num_hidden_layers=3)
    keys = set(base.state_dict())
    module = caft(base, learning_rate=1e-2)
    trajectory(tmp_path, module, steps=2)
    module.model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(loaded.state_dict()) == keys
    ids = torch.randint(0, 128, (2, 9))
    torch.testing.assert_close(loaded.eval()(ids).logits, module.model.eval()(ids).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_no_head_sees_the_future(build, attention):
    module = caft(build(attn_implementation=attention), heads_coefficient=1.0).eval()
    t, batch = 5, batch_of(rows(1))
    changed = {k: v.clone() for k, v in batch.items()}
    changed["input_ids"][:, t + 1 :] = (changed["input_ids"][:, t + 1 :] + 7) % 128

    def outputs(b):
        trunk = trunk_of(module.model, {k: b[k] for k in ("input_ids", "attention_mask")})
        labels = [head_labels(b["labels"], k) for k in range(1, HEADS + 1)]
        return module.auxiliary_heads(trunk, None, labels)

    for before, after in zip(outputs(batch), outputs(changed)):
        torch.testing.assert_close(before[:, : t + 1], after[:, : t + 1])
        assert not torch.allclose(before[:, t + 1 :], after[:, t + 1 :])


def test_a_copy_of_the_last_block_is_the_networks_own_head():
    from lightning_peft.objectives.auxiliary_heads import AuxiliaryHeads

    network = tiny_llama(num_hidden_layers=3).eval()
    heads = AuxiliaryHeads(network, 2, copied_layer=-1)
    batch = batch_of(rows(2))
    trunk = trunk_of(network, {k: batch[k] for k in ("input_ids", "attention_mask")})
    (hidden,) = heads(trunk, final_norm(network), [batch["labels"]])
    torch.testing.assert_close(network.lm_head(hidden), network(batch["input_ids"]).logits, rtol=1e-5, atol=1e-5)


def test_frozen_heads_pass_exactly_their_gradient_to_the_trunk(tmp_path):
    module, batch = caft(heads_coefficient=0.5), batch_of(rows(3))
    module.terms(batch, counts_of(module, batch)).loss.backward()
    with_heads = gradients(module.model)
    assert all(p.grad is None for p in module.auxiliary_heads.parameters())
    losses = expected_terms(module, batch)
    names, weights = zip(*module.model.named_parameters())
    plain = torch.autograd.grad(losses[0], weights, retain_graph=True)
    auxiliary = sum(0.8**k * loss for k, loss in enumerate(losses) if k)
    extra = torch.autograd.grad(auxiliary, weights, allow_unused=True)
    for name, g0, g in zip(names, plain, extra):
        expected = g0 if g is None else g0 + 0.5 * g
        torch.testing.assert_close(with_heads[name], expected, rtol=1e-4, atol=1e-6)
    optimizer = torch.optim.AdamW(module.parameter_groups()[0]["params"])
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not owned & {id(p) for p in module.auxiliary_heads.parameters()}


def test_head_labels_stay_in_their_document():
    labels = torch.tensor([[1, 2, 3, 4, 5, 6]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert head_labels(labels, 1).tolist() == [[3, 4, 5, 6, -100, -100]]
    assert head_labels(labels, 1, documents).tolist() == [[3, -100, -100, 6, -100, -100]]
    assert head_labels(labels, 9).eq(-100).all()


def test_a_head_without_a_label_gives_zero():
    module, batch = caft(heads_coefficient=1.0), batch_of(rows(2))
    batch["labels"][:, 3:] = -100  # head 3 would need a label at position 4 or later
    batch["labels"][:, :3] = batch["input_ids"][:, :3]
    with pytest.warns(UserWarning, match="head_3: no label in a batch"):
        counts = counts_of(module, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        terms = module.terms(batch, counts)
        module.counts(batch)
    assert torch.isfinite(terms.loss)
    assert terms.counts["head_3"] == 0
    assert terms.sums["head_3"] == 0


def test_pretraining_trains_the_heads_alone_and_their_file_is_read_again(tmp_path):
    network = tiny_llama(num_hidden_layers=3)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    module = AuxiliaryHeadPretrainingCausalLM(model=network, predicted_tokens=3, learning_rate=1e-2)
    batch = batch_of(rows(3))
    losses = expected_terms(module, batch)
    expected = sum(0.8**k * losses[k] for k in (1, 2))
    torch.testing.assert_close(module.terms(batch, counts_of(module, batch)).loss, expected, rtol=1e-5, atol=1e-6)
    start = [p.clone() for p in module.auxiliary_heads.parameters()]
    trajectory(tmp_path, module, steps=3)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(not torch.equal(a, b) for a, b in zip(start, module.auxiliary_heads.parameters()))
    save_heads(module.auxiliary_heads, tmp_path / "heads.safetensors")
    joint = ConceptAwareCausalLM(model=network.requires_grad_(True), predicted_tokens=3, heads=str(tmp_path))
    for a, b in zip(module.auxiliary_heads.parameters(), joint.auxiliary_heads.parameters()):
        assert torch.equal(a, b)
        assert not b.requires_grad


def test_heads_of_another_base_or_shape_are_refused(tmp_path):
    module = caft()
    path = tmp_path / "heads.safetensors"
    save_heads(module.auxiliary_heads, path)
    other = caft(tiny_llama(num_hidden_layers=3, hidden_size=64))
    with pytest.raises(ValueError, match="hidden_size"):
        load_heads(other.auxiliary_heads, str(path))
    with pytest.raises(ValueError, match="heads: file has 3, asked for 1"):
        caft(module.model, predicted_tokens=2, heads=str(path), heads_init="checkpoint")
    with pytest.raises(ValueError, match="head_input"):
        caft(module.model, head_input="final", heads=str(path), heads_init="checkpoint")
    # the published code's change of input between the phases, by name
    ConceptAwareFineTuning(HEADS + 1, str(path), reproduce_repository=True).attach(CausalLM(module.model))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"predicted_tokens": 0}, "predicted_tokens=0"),
        ({"heads_init": "checkpoint"}, "heads_init='copy'"),
        ({"heads_init": "zeros"}, "heads_init='zeros'"),
        ({"head_arch": "mlp"}, "head_arch='mlp'"),
        ({"head_input": "first"}, "head_input='first'"),
        ({"head_layers": 0}, "head_layers=0"),
        ({"heads_coefficient": -1.0}, "heads_coefficient=-1.0"),
        ({"heads": "nowhere.pth"}, "no such file"),
    ],
)
def test_bad_arguments_name_themselves(kwargs, message):
    with pytest.raises(ValueError, match=message):
        caft(**kwargs)


def test_adapters_before_heads_are_refused():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=r"callbacks\.PEFT"):
        caft(get_peft_model(tiny_llama(num_hidden_layers=3), LoraConfig(target_modules=["q_proj"])))


def test_unknown_number_of_steps_is_refused_before_the_first(tmp_path):
    module = caft(heads_schedule="rsine", lr_scheduler="constant")

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield rows(1)[0]

    loader = torch.utils.data.DataLoader(Endless(), batch_size=2, collate_fn=batch_of)
    with pytest.raises(ValueError, match="max_steps"):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, loader)


def test_multi_token_loss_is_exact_over_batches(tmp_path):
    module = caft()
    loader = torch.utils.data.DataLoader(rows(10), batch_size=3, collate_fn=batch_of)
    (result,) = quiet_trainer(tmp_path).validate(module, loader, verbose=False)
    module.eval()
    losses = expected_terms(module, batch_of(rows(10)))
    expected = sum(0.8**k * loss for k, loss in enumerate(losses))
    assert result["val_multi_token_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert result["val_head_2"] == pytest.approx(losses[2].item(), rel=1e-5)


# -- behaviour: the next token is a coin flip, the token after it a function of the prefix -----------------------------

VALUES = 5


def coin_rows(n: int, seed: int, second: bool = True) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rows of "a b r f", r a coin flip and f = (a + b) mod 5; and f, [n, 6]. Without `second`, b is always 0."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(0, VALUES, (2, n, 6), generator=generator)
    b = b if second else torch.zeros_like(b)
    flip = torch.randint(0, 2, (n, 6), generator=generator)
    value = (a + b) % VALUES
    ids = torch.stack([10 + a, 20 + b, 30 + flip, 40 + value], -1).flatten(1)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}, value


def from_seed(seed: int, std: float = 0.08):
    network = tiny_llama(layers=3)
    torch.manual_seed(seed)
    for weight in network.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=std)
    return network


def learn(module, steps: int, rate: float, **kwargs) -> None:
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        batch, _ = coin_rows(32, step, **kwargs)
        optimizer.zero_grad()
        module.terms(batch, counts_of(module, batch)).loss.backward()
        optimizer.step()


def behind_the_coin(module) -> float:
    """Held-out loss of head 1 where the token after the coin flip is to be told, in nats."""
    batch, _ = coin_rows(32, 7777, second=False)
    batch["labels"][:, torch.arange(24) % 4 != 3] = -100
    module.eval()
    with torch.no_grad():
        terms = module.terms(batch, counts_of(module, batch))
    module.train()
    return float(terms.sums["head_1"] / terms.counts["head_1"])


def test_a_trained_head_sees_behind_a_coin_flip():
    network = from_seed(0, std=0.3)
    learn(CausalLM(network), 60, 3e-3, second=False)
    module = AuxiliaryHeadPretrainingCausalLM(model=network, predicted_tokens=2)
    assert behind_the_coin(module) > 2
    learn(module, 200, 1e-2, second=False)
    assert behind_the_coin(module) < 0.1


def probed(network) -> float:
    """Accuracy of a linear probe for f at the position of b, on what the last block reads."""
    seen = []
    batch, value = coin_rows(150, 9001)
    _, block = transformer_blocks(network)[-1]
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network.eval()(input_ids=batch["input_ids"], use_cache=False)
    handle.remove()
    states = seen[0][:, 1::4].flatten(0, 1).double()
    states, value = torch.cat([states, torch.ones(len(states), 1)], 1), value.flatten()
    half = len(states) // 2
    fitted = torch.linalg.lstsq(states[:half], F.one_hot(value[:half], VALUES).double()).solution
    return float(((states[half:] @ fitted).argmax(1) == value[half:]).float().mean())


def test_the_trunk_knows_earlier_what_comes_behind_a_coin_flip():
    """Equal steps on equal data from equal weights, with and without the heads' loss: the paper's claim, seen small."""
    plain, aware = [], []
    for seed in range(2):
        for found, options in ((plain, None), (aware, {"predicted_tokens": 2, "heads_init": "copy"})):
            network = from_seed(seed)
            if options is None:
                module = CausalLM(network)
            else:
                options |= {"heads_coefficient": 1.0, "heads_schedule": "constant", "finetune_heads": True}
                module = ConceptAwareCausalLM(model=network, **options)
            learn(module, 120, 3e-3)
            found.append(probed(network))
    assert min(aware) > max(plain) + 0.1, f"probe with the heads' loss {aware}, without {plain}"
