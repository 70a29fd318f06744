"""Self-constrained fine-tuning (paper 52) against `F.kl_div` on whole logits."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType
from torch.nn import functional as F

from lightning_peft.callbacks import PEFT
from lightning_peft.datamodules import LookAheadDataLoader, ReferenceData
from lightning_peft.models import CausalLM
from lightning_peft.network_modes import adapters_disabled, evaluation_mode
from lightning_peft.objectives import SelfConstrained, SelfConstrainedCausalLM
from tests.models.test_causal_lm import batch_of, counts_of, gradients, quiet_trainer, rows
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer


def log_p_of(network, batch) -> torch.Tensor:
    """log p over the vocabulary at every supervised position, [n, vocabulary]."""
    logits = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return logits.log_softmax(-1)[batch["labels"][:, 1:] != -100]


def expected_loss(network, reference, batch, weight: float, direction: str) -> torch.Tensor:
    log_p = log_p_of(network, batch)
    with torch.no_grad():
        log_q = log_p_of(reference.eval(), batch)
    first, second = (log_q, log_p) if direction == "reverse" else (log_p, log_q)
    kl = F.kl_div(first, second, log_target=True, reduction="none").sum(-1).mean()  # KL(second || first)
    labels = batch["labels"][:, 1:]
    return -log_p.gather(1, labels[labels != -100][:, None]).mean() + weight * kl


def moved(network, seed: int = 1, std: float = 0.05, trained_only: bool = False) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad or not trained_only:
                p.add_(torch.randn_like(p) * std)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_loss_and_gradient_equal_kl_div_on_whole_logits(direction, build):
    network, batch = build(), batch_of(rows(4))
    start = copy.deepcopy(network).double()
    module = SelfConstrainedCausalLM(network, nsc_weight=0.7, nsc_direction=direction)
    moved(network)
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    exact = copy.deepcopy(network).double()
    exact.zero_grad()
    loss = expected_loss(exact, start, batch, 0.7, direction)
    loss.backward()
    assert terms.sums["reference_kl"] > 0.01
    torch.testing.assert_close(terms.loss.double(), loss, rtol=1e-5, atol=1e-7)
    for name, grad in gradients(network).items():
        torch.testing.assert_close(grad.double(), gradients(exact)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_at_the_start_the_term_and_its_gradient_are_zero(direction):
    """So the first step is plain fine-tuning's."""
    network, batch = tiny_llama(), batch_of(rows(4))
    found = []
    for objectives in ([], [SelfConstrained(100.0, direction)]):
        module = CausalLM(network, objectives=objectives)
        network.zero_grad()
        terms = module.terms(batch, counts_of(module, batch))
        terms.loss.backward()
        found.append(gradients(network))
    assert terms.sums["reference_kl"] == 0
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=1e-6)


def test_the_reference_has_no_dropout_and_the_network_keeps_its_modes():
    network, batch = tiny_gpt2(dropout=0.3), batch_of(rows(3))
    module = SelfConstrainedCausalLM(network)
    network.transformer.h[0].eval()  # somebody's choice
    first, second = (module.before_forward(batch)["reference_hidden"] for _ in range(2))
    assert torch.equal(first, second)
    assert network.training
    assert not network.transformer.h[0].training
    assert network.transformer.h[1].mlp.training
    with evaluation_mode(network):
        assert not any(part.training for part in network.modules())
    assert not network.transformer.h[0].training


def lora(**kwargs) -> PEFT:
    return PEFT(LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **kwargs}))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_dropout": 0.5},
        {"target_modules": ["q_proj", "lm_head"]},  # a head that is more than a matrix
        {"modules_to_save": ["lm_head"]},
        {"bias": "none", "use_dora": True},
    ],
)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_adapters_switched_off_give_what_a_frozen_copy_gives(config, direction):
    batch, found = batch_of(rows(3)), []
    for reference in ("frozen_copy", "adapter_disabled"):
        module = SelfConstrainedCausalLM(tiny_llama(), nsc_reference=reference, nsc_weight=2.0, nsc_direction=direction)
        torch.manual_seed(0)
        lora(**config).attach(module)
        moved(module.model, trained_only=True, std=0.2)
        wanted = {name: p.requires_grad for name, p in module.named_parameters()}
        torch.manual_seed(0)
        terms = module.terms(batch, counts_of(module, batch))
        terms.loss.backward()
        assert wanted == {name: p.requires_grad for name, p in module.named_parameters()}
        assert terms.sums["reference_kl"] > 0.01
        found.append((terms.loss.detach(), gradients(module.model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-4, atol=1e-6)


def matrices() -> set[int]:
    """Storages of all live tensors of the shape of the tiny network's embeddings and its head."""
    gc.collect()
    shape = tiny_llama().lm_head.weight.shape
    live = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter) and one.shape == shape]
    return {one.untyped_storage().data_ptr() for one in live if not one.is_meta}


@pytest.mark.parametrize(("reference", "copies"), [("adapter_disabled", 1), ("frozen_copy", 2)])
def test_adapters_switched_off_need_no_second_network(reference, copies, tmp_path):
    before = matrices()
    module = SelfConstrainedCausalLM(tiny_llama(), nsc_reference=reference, learning_rate=1e-2, lr_scheduler="constant")
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[lora()])
    seen: list[int] = []

    def look(module, *_) -> None:
        seen.append(len(matrices() - before))

    # While the step runs too: gradients and moments are the adapters' alone, nothing else has the shape.
    handle = module.model.lm_head.register_forward_hook(look)
    trainer.fit(module, LookAheadDataLoader(rows(8), batch_size=4, collate_fn=batch_of))
    handle.remove()
    assert module.trainer.callback_metrics["train_reference_kl"] > 0
    assert len(seen) >= 2
    assert {*seen, len(matrices() - before)} == {2 * copies}  # embeddings and head
    own = {id(p) for p in module.model.parameters()}
    assert own == {id(p) for p in module.parameters()}
    held = [one for one in vars(module.objectives[0]).values() if isinstance(one, (torch.Tensor, torch.nn.Module))]
    assert len(held) == copies - 1


def test_prompt_learning_is_switched_off_too():
    module, batch = SelfConstrainedCausalLM(tiny_llama(), nsc_reference="adapter_disabled"), batch_of(rows(3))
    batch["labels"][:, 0] = -100
    start = copy.deepcopy(module.model)
    PEFT(PrefixTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM)).attach(module)
    terms = module.terms(batch, counts_of(module, batch))
    log_p, log_q = log_p_of(module.model, batch), log_p_of(start.eval(), batch)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    torch.testing.assert_close(
        terms.sums["reference_kl"] / terms.counts["reference_kl"], kl.detach(), rtol=1e-4, atol=1e-6
    )
    assert kl > 1e-3


def test_only_adapters_may_differ_from_a_network_with_adapters_switched_off(tmp_path):
    def fit(*callbacks, **kwargs):
        module = SelfConstrainedCausalLM(tiny_llama(**kwargs), nsc_reference="adapter_disabled")
        trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=list(callbacks))
        trainer.fit(module, LookAheadDataLoader(rows(4), batch_size=2, collate_fn=batch_of))

    fit(lora(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="the network has no adapter"):
        fit()
    with pytest.raises(ValueError, match=r"other weights train.*bias"):
        fit(lora(bias="all"), attention_bias=True)
    with pytest.raises(ValueError, match="changed by the adapter's initialisation"):
        fit(lora(init_lora_weights="pissa"))


def test_the_reference_stays_the_start_over_a_resumed_run_and_out_of_checkpoints(tmp_path):
    """Whole run against one that is stopped and resumed in a fresh module: had it copied the resumed weights, KL would
    begin at 0 again."""

    def run(max_epochs, resume=None):
        torch.manual_seed(0)
        module = SelfConstrainedCausalLM(
            tiny_llama(), nsc_weight=5.0, learning_rate=1e-2, lr_scheduler="constant", optimizer="sgd"
        )
        trainer = quiet_trainer(tmp_path, max_epochs=max_epochs)
        loader = LookAheadDataLoader(rows(12), batch_size=4, shuffle=False, collate_fn=batch_of)
        trainer.fit(module, loader, ckpt_path=resume)
        return module, trainer

    whole, trainer = run(2)
    _, first = run(1)
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed, second = run(2, tmp_path / "one.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    assert torch.equal(trainer.callback_metrics["train_reference_kl"], second.callback_metrics["train_reference_kl"])
    assert trainer.callback_metrics["train_reference_kl"] > 0
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert len(checkpoint["state_dict"]) == len(whole.state_dict()) == len(tiny_llama().state_dict())
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in whole.parameters()}


def test_a_checkpoint_of_another_start_is_refused(tmp_path):
    module = SelfConstrainedCausalLM(tiny_llama())
    trainer = quiet_trainer(tmp_path, max_steps=1)
    loader = LookAheadDataLoader(rows(4), batch_size=2, collate_fn=batch_of)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = tiny_llama()
    moved(other)
    with pytest.raises(ValueError, match="held near another network"):
        quiet_trainer(tmp_path, max_steps=2).fit(
            SelfConstrainedCausalLM(other), loader, ckpt_path=tmp_path / "one.ckpt"
        )


def test_a_large_weight_keeps_the_network_where_it_was(tmp_path):
    found = {}
    for weight in (0.0, 1000.0):
        torch.manual_seed(0)
        module = SelfConstrainedCausalLM(tiny_llama(), nsc_weight=weight, learning_rate=1e-4, lr_scheduler="constant")
        loader = LookAheadDataLoader(rows(8), batch_size=4, shuffle=False, collate_fn=batch_of)
        quiet_trainer(tmp_path, max_epochs=15).fit(module, loader)
        batch = batch_of(rows(8))
        with torch.no_grad():
            log_p, log_q = log_p_of(module.model.eval(), batch), log_p_of(tiny_llama().eval(), batch)
            kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
            found[weight] = (kl.item(), CausalLM(module.model).row_losses(batch)[1].mean().item())
    start = CausalLM(tiny_llama().eval()).row_losses(batch_of(rows(8)))[1].mean().item()
    assert found[1000.0][0] < found[0.0][0] / 20
    assert abs(found[1000.0][1] - start) < (start - found[0.0][1]) / 2


def test_a_weight_of_zero_is_plain_fine_tuning_bit_for_bit(tmp_path):
    def trained(objectives):
        torch.manual_seed(0)
        module = CausalLM(tiny_llama(dropout=0.1), objectives=objectives, learning_rate=1e-2)
        loader = LookAheadDataLoader(rows(8), batch_size=4, shuffle=False, collate_fn=batch_of)
        quiet_trainer(tmp_path, max_epochs=2).fit(module, loader)
        return list(module.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained([]), trained([SelfConstrained(nsc_weight=0.0)])))


# -- the cached reference ---------------------------------------------------------------------------------------------

TEXT = [
    {"prompt": "a b ", "completion": "c d e f"},
    {"prompt": "g ", "completion": "h i"},
    {"prompt": "j ", "completion": "k"},
]


def cached(tmp_path, k: int, packing: bool = False, **kwargs) -> tuple[SelfConstrainedCausalLM, ReferenceData]:
    module = SelfConstrainedCausalLM(tiny_llama(), tokenizer=tiny_tokenizer(), nsc_reference="cached", **kwargs)
    data = ReferenceData(
        TEXT,
        tokenizer=tiny_tokenizer(),
        reference_top_k=k,
        cache_dir=str(tmp_path / "cache"),
        batch_size=3,
        max_length=20,
        packing=packing,
        shuffle=False,
    )
    quiet_trainer(tmp_path, max_epochs=0).fit(module, data)
    return module, data


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_cached_reference_of_the_whole_vocabulary_is_exact(tmp_path, direction, packing):
    module, data = cached(tmp_path, 127, packing, nsc_direction=direction, nsc_weight=3.0)
    (batch,) = data.train_dataloader()
    terms = module.terms(batch, counts_of(module, batch))
    assert terms.sums["reference_kl"].abs() < 1e-5
    copied = SelfConstrainedCausalLM(module.model, nsc_direction=direction, nsc_weight=3.0)
    moved(module.model)
    found = []
    for one in (module, copied):
        module.model.zero_grad()
        terms = one.terms(batch, counts_of(one, batch))
        terms.loss.backward()
        found.append((terms.loss.detach(), gradients(module.model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_few_tokens_give_a_lower_bound_that_grows_with_them(tmp_path, direction):
    found = []
    for k in (1, 8, 64, 127):
        module, data = cached(tmp_path, k, nsc_direction=direction)
        (batch,) = data.train_dataloader()
        moved(module.model, std=0.1)
        found.append(module.terms(batch, counts_of(module, batch)).sums["reference_kl"].item())
    assert 0 <= found[0] < found[1] < found[2] < found[3]


def test_a_batch_without_the_cache_is_refused():
    module, batch = SelfConstrainedCausalLM(tiny_llama(), nsc_reference="cached"), batch_of(rows(2))
    with pytest.raises(ValueError, match=r"datamodules\.ReferenceData"):
        module.terms(batch, counts_of(module, batch))
    batch["reference_ids"] = torch.zeros(2, 3, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="reference_ids has shape"):
        module.terms(batch, counts_of(module, batch))


def test_bad_arguments_name_themselves(tmp_path):
    for kwargs, message in (
        ({"nsc_weight": -1.0}, "nsc_weight=-1.0"),
        ({"nsc_direction": "both"}, "nsc_direction='both'"),
        ({"nsc_reference": "copy"}, "nsc_reference='copy'"),
    ):
        with pytest.raises(ValueError, match=message):
            SelfConstrained(**kwargs)
    with pytest.raises(ValueError, match="reference_top_k=0"):
        ReferenceData(TEXT, reference_top_k=0)
    with pytest.raises(ValueError, match="reference_top_k=128 must be below"):
        cached(tmp_path, 128)


def test_switching_adapters_off_leaves_no_trace():
    module = CausalLM(tiny_llama())
    lora(modules_to_save=["lm_head"]).attach(module)
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    ids = torch.randint(5, 128, (1, 6))
    moved(module.model, trained_only=True)
    adapted = module.model.eval()(ids).logits
    with adapters_disabled(module.model):
        bare = module.model(ids).logits
    torch.testing.assert_close(bare, tiny_llama().eval()(ids).logits)
    assert torch.equal(module.model(ids).logits, adapted)
    assert before == {name: p.requires_grad for name, p in module.named_parameters()}
