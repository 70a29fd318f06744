"""Meta-learned token weights (paper 81): gradients by finite differences and unrolled autograd, resets, a toy."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_peft.datamodules import LookAheadDataLoader
from lightning_peft.models import CausalLM
from lightning_peft.objectives import DynamicFineTuning, MetaTokenWeighting, MetaTokenWeightingCausalLM
from lightning_peft.objectives.meta_weighting import InnerStep, TokenWeightNetwork, weight_gradients
from tests.models.test_causal_lm import counts_of, quiet_trainer
from tests.tiny import tiny_gpt2, tiny_llama

# -- meta-gradients on a linear model, in float64 ----------------------------------------------------------------------

RATE = 0.3


def linear_problem(documents: int = 1):
    """Documents of 6 tokens and questions for a softmax regression; its per-token nll and its outer loss."""
    generator = torch.Generator().manual_seed(0)

    def rows(n: int):
        return torch.randn(n, 4, generator=generator).double(), torch.randint(0, 5, (n,), generator=generator)

    data, questions = [rows(6) for _ in range(documents)], rows(3)
    theta = {"weight": torch.randn(5, 4, generator=generator).double(), "bias": torch.zeros(5).double()}
    weights = [torch.rand(6, generator=generator).double() + 0.1 for _ in range(documents)]

    def losses(parameters, part):
        return F.cross_entropy(part[0] @ parameters["weight"].T + parameters["bias"], part[1], reduction="none")

    def outer(parameters):
        return losses(parameters, questions).mean()

    return data, theta, weights, losses, outer


def after_steps(data, theta, weights, losses):
    """Parameters after all steps, unrolled with a graph."""
    theta = {name: value.clone().requires_grad_() for name, value in theta.items()}
    for part, own in zip(data, weights):
        gradient = torch.autograd.grad((own * losses(theta, part)).sum() / 6, list(theta.values()), create_graph=True)
        theta = {name: value - RATE * g for (name, value), g in zip(theta.items(), gradient)}
    return theta


def ours(data, theta, weights, losses, outer):
    steps: list[InnerStep] = []
    for part in data:
        theta = steps[-1].after(weights[len(steps) - 1], RATE) if steps else theta
        steps.append(InnerStep(lambda p, part=part: losses(p, part), theta, torch.arange(6), 6.0))
    leaves = {name: value.requires_grad_() for name, value in steps[-1].after(weights[-1], RATE).items()}
    v = dict(zip(leaves, torch.autograd.grad(outer(leaves), list(leaves.values()))))
    return weight_gradients(steps, weights, v, RATE), leaves


def test_one_step_is_the_inner_product_of_gradients():
    """-a/n <grad L(theta'), grad nll_t>, token by token."""
    data, theta, weights, losses, outer = linear_problem()
    (made,), adapted = ours(data, theta, weights, losses, outer)
    v = torch.autograd.grad(outer(adapted), list(adapted.values()))
    start = {name: value.clone().requires_grad_() for name, value in theta.items()}
    for t, nll in enumerate(losses(start, data[0])):
        gradient = torch.autograd.grad(nll, list(start.values()), retain_graph=True)
        expected = -RATE / 6 * sum((a * b).sum() for a, b in zip(v, gradient))
        torch.testing.assert_close(made[t], expected)


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_gradients_are_those_of_the_unrolled_steps_and_of_finite_differences(documents):
    data, theta, weights, losses, outer = linear_problem(documents)
    made, adapted = ours(data, theta, weights, losses, outer)
    leaves = [own.clone().requires_grad_() for own in weights]
    unrolled = after_steps(data, theta, leaves, losses)
    torch.testing.assert_close(dict(adapted), unrolled)
    for a, b in zip(made, torch.autograd.grad(outer(unrolled), leaves)):
        torch.testing.assert_close(a, b)
        assert float(a.abs().min()) > 0  # weights that were detached would have none
    step = 1e-5
    for document, t in [(0, 0), (0, 4), (documents - 1, 2)]:
        values = []
        for sign in (1, -1):
            moved = [own.clone() for own in weights]
            moved[document][t] += sign * step
            values.append(float(outer(after_steps(data, theta, moved, losses))))
        assert float(made[document][t]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9)


# -- the module --------------------------------------------------------------------------------------------------------


def meta(network=None, **kwargs) -> MetaTokenWeightingCausalLM:
    options = {
        "meta_documents": 3,
        "meta_reset_every": 3,
        "meta_rate": 0.2,
        "learning_rate": 0.02,
        "optimizer": "adamw",
    }
    torch.manual_seed(0)
    module = MetaTokenWeightingCausalLM(network or tiny_llama(layers=1), **{**options, **kwargs})
    torch.nn.init.normal_(module.token_weights.outer.weight, std=0.3)  # not the start, where all weights are equal
    return module


def batch_of(documents: int = 3, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def text(n: int, time: int) -> dict:
        ids = torch.randint(5, 128, (n, time), generator=generator)
        mask = torch.arange(time)[None] < torch.randint(3, time + 1, (n, 1), generator=generator)
        return {"input_ids": ids, "attention_mask": mask.long()}

    batch = {**text(documents, 6), "documents": text(documents, 9), "unrelated": text(1, 7)}
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    batch["labels"][:, :2] = -100
    return batch


def unrolled_loss(module, batch, sequential: bool, by_padding: bool):
    """The whole of it by plain logits, functional_call and one graph."""
    network, documents = module.model, batch["documents"]
    base = dict(network.named_parameters())
    theta = {name: value.detach().clone().requires_grad_() for name, value in base.items()}
    ids, mask = documents["input_ids"], documents["attention_mask"]
    weights = module.token_weights(ids, mask)

    def logits(parameters, ids, mask):
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(network, parameters, kwargs={"input_ids": ids, "attention_mask": mask}).logits

    for group in [slice(i, i + 1) for i in range(len(ids))] if sequential else [slice(0, len(ids))]:
        own = mask[group, 1:].float()
        nll = F.cross_entropy(
            logits(theta, ids[group], mask[group])[:, :-1].transpose(1, 2), ids[group, 1:], reduction="none"
        )
        inner = (weights[group, 1:] * nll * own).sum() / (own.numel() if by_padding else own.sum())
        gradient = torch.autograd.grad(inner, list(theta.values()), create_graph=True, allow_unused=True)
        theta = {n: v if g is None else v - 0.2 * g for (n, v), g in zip(theta.items(), gradient)}
    labels = batch["labels"][:, 1:]
    qa = F.cross_entropy(logits(theta, batch["input_ids"], batch["attention_mask"])[:, :-1].transpose(1, 2), labels)
    text = batch["unrelated"]
    before, after = (logits(p, text["input_ids"], text["attention_mask"]).log_softmax(-1) for p in (base, theta))
    kl = ((before.exp() * (before - after)).sum(-1) * text["attention_mask"]).sum() / text["attention_mask"].sum()
    return qa + 0.1 * kl, theta


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])  # the second has a tied head
@pytest.mark.parametrize(("sequential", "by_padding"), [(True, False), (False, False), (True, True)])
def test_loss_and_gradients_are_those_of_the_unrolled_graph(build, sequential, by_padding):
    module = meta(build(dropout=0.3), meta_sequential=sequential, meta_divide_by_padding=by_padding)
    module.token_weights.eval()
    batch = batch_of()
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    made = {name: p.grad.clone() for name, p in module.token_weights.named_parameters()}
    module.zero_grad()
    assert all(part.training for part in module.model.modules())
    expected, _ = unrolled_loss(_eval(module), batch, sequential, by_padding)
    expected.backward()
    torch.testing.assert_close(terms.loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in module.token_weights.named_parameters():
        torch.testing.assert_close(made[name], parameter.grad, rtol=2e-3, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float(g.abs().max()) for g in made.values()) > 1e-4
    assert all(p.grad is None for p in module.model.parameters())


def _eval(module):
    module.model.eval()
    return module


def test_the_base_stays_and_only_the_weight_network_trains(tmp_path):
    module = meta()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loader = LookAheadDataLoader([batch_of(seed=i) for i in range(4)], batch_size=None)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, loader)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("token_weights.") for name in changed)


def test_weights_at_the_start_are_equal_and_padding_has_none():
    module = MetaTokenWeightingCausalLM(tiny_gpt2())
    documents = batch_of()["documents"]
    weights = module.token_weights(**documents)
    torch.testing.assert_close(weights, 0.23104906 * documents["attention_mask"])
    assert isinstance(module.token_weights, TokenWeightNetwork)
    assert not {id(p) for p in module.token_weights.parameters()} & {id(p) for p in module.model.parameters()}


def test_validation_adapts_too_and_says_what_it_was_before(tmp_path):
    module = meta()
    batch = batch_of()
    trainer = quiet_trainer(tmp_path)
    (logged,) = trainer.validate(module, LookAheadDataLoader([batch], batch_size=None), verbose=False)
    module.eval()
    expected, _ = unrolled_loss(module, batch, sequential=True, by_padding=False)
    assert logged["val_loss"] + logged["val_locality"] == pytest.approx(float(expected), abs=1e-5)
    plain = CausalLM(module.model).eval()
    assert logged["val_unadapted"] == pytest.approx(float(plain.terms(batch, counts_of(plain, batch)).loss), abs=1e-5)


def test_dropout_in_the_inner_steps_is_the_same_in_their_derivative():
    """A finite difference along one token's weight, the masks fixed by the seed."""
    module = meta(
        tiny_gpt2(dropout=0.2).double(), meta_dropout=True, meta_documents=2, meta_reset_every=2, meta_locality=0.0
    )
    module.token_weights.double().eval()
    batch = batch_of(2)

    def loss(shift: float) -> torch.Tensor:
        torch.manual_seed(7)
        with torch.no_grad():
            module.token_weights.outer.bias.fill_(shift)
        return module.terms(batch, counts_of(module, batch)).loss

    made = torch.autograd.grad(loss(0.0), module.token_weights.outer.bias)[0]
    difference = (loss(1e-4) - loss(-1e-4)).detach() / 2e-4
    torch.testing.assert_close(made[0], difference, rtol=1e-2, atol=1e-6)
    module.meta_weighting.dropout = False
    assert float(abs(loss(0.0) - 0)) > 0


# -- the stream --------------------------------------------------------------------------------------------------------


def adapted_by_step(module) -> list[bool]:
    """Whether the base is an adapted one, seen by each of a run's batches."""
    seen: list[bool] = []
    objective, base = module.meta_weighting, dict(module.model.named_parameters())
    adapt = objective._adapt

    def watched(module, theta, *args):
        seen.append(any(not torch.equal(value, base[name]) for name, value in theta.items()))
        return adapt(module, theta, *args)

    objective._adapt = watched
    return seen


def test_the_base_is_reset_at_exactly_24_documents_also_after_a_resume(tmp_path):
    """6 documents a batch: every fourth batch begins with the base, wherever the run was stopped."""

    def loader() -> LookAheadDataLoader:
        rows = [batch_of(6, seed=i) for i in range(9)]
        for row in rows:  # short ones will do
            row["documents"] = {key: value[:, :4] for key, value in row["documents"].items()}
        return LookAheadDataLoader(rows, batch_size=None)

    def module() -> MetaTokenWeightingCausalLM:
        return meta(meta_documents=6, meta_reset_every=24, lr_scheduler="constant")

    whole = module()
    seen = adapted_by_step(whole)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(whole, loader())
    expected = [bool(i % 4) for i in range(9)]
    assert seen == expected * 2  # an epoch begins anew
    for stop in (3, 4, 9):
        again = module()
        rest = adapted_by_step(again)
        quiet_trainer(tmp_path, max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert rest == (expected * 2)[stop:]
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters()))


FILLER, KEYS, VALUES = (100, 128), (80, 100), (60, 80)


def facts(n: int, seed: int) -> dict:
    """Documents of filler with a fact (a key and its value) in them; the question is the key."""
    generator = torch.Generator().manual_seed(seed)

    def draw(span: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(*span, shape, generator=generator)

    keys, values = draw(KEYS, (n, 1)), draw(VALUES, (n, 1))
    documents = torch.cat([draw(FILLER, (n, 5)), keys, values, draw(FILLER, (n, 3))], 1)
    questions = torch.cat([keys, values], 1)
    return {
        "input_ids": questions,
        "labels": torch.cat([torch.full_like(keys, -100), values], 1),
        "attention_mask": torch.ones_like(questions),
        "documents": {"input_ids": documents, "attention_mask": torch.ones_like(documents)},
    }


def loss_after_a_step(module, batch, weights: torch.Tensor, rate: float) -> float:
    """The questions' loss after one step on each document alone, weighted."""
    documents, total = batch["documents"]["input_ids"], 0.0
    base = dict(module.model.named_parameters())
    for row, ids in enumerate(documents):
        theta = {name: value.detach().requires_grad_() for name, value in base.items()}
        logits = functional_call(module.model, theta, (ids[None],)).logits[0, :-1]
        loss = (weights[row, 1:] * F.cross_entropy(logits, ids[1:], reduction="none")).mean()
        gradient = torch.autograd.grad(loss, list(theta.values()))
        theta = {name: value - rate * g for (name, value), g in zip(theta.items(), gradient)}
        answer = functional_call(module.model, theta, (batch["input_ids"][row : row + 1, :1],)).logits[0, -1]
        total += float(F.cross_entropy(answer, batch["input_ids"][row, 1]).detach())
    return total / len(documents)


def test_facts_get_more_weight_than_filler_and_are_learnt_better(tmp_path):
    module = meta(
        meta_documents=4,
        meta_reset_every=4,
        meta_rate=2.0,
        meta_locality=0.0,
        learning_rate=5e-3,
        meta_sequential=False,
        lr_scheduler="constant",
    )
    torch.nn.init.zeros_(module.token_weights.outer.weight)
    loader = LookAheadDataLoader([facts(4, seed=i) for i in range(80)], batch_size=None)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, loader)
    module.eval()
    held = facts(12, seed=10_000)
    with torch.no_grad():
        weights = module.token_weights(**held["documents"])
    ids = held["documents"]["input_ids"]
    fact = weights[(ids >= VALUES[0]) & (ids < VALUES[1])].mean()
    filler = weights[:, 1:][ids[:, 1:] >= FILLER[0]].mean()
    assert float(fact) > 2 * float(filler)
    rates = [0.25 * 2**k for k in range(8)]
    best = {
        name: min(loss_after_a_step(module, held, own, rate) for rate in rates)
        for name, own in {"learned": weights, "uniform": torch.ones_like(weights)}.items()
    }
    assert best["learned"] < best["uniform"]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_it_needs_is_said(tmp_path):
    with pytest.raises(ValueError, match="meta_reset_every=24 must be a multiple of meta_documents=5"):
        meta(meta_documents=5, meta_reset_every=24)
    with pytest.raises(ValueError, match="meta_rate=0"):
        meta(meta_rate=0.0)
    with pytest.raises(ValueError, match="stored in float16"):
        meta(tiny_llama().half())
    flash = tiny_llama()
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="no second derivative"):
        meta(flash)
    tiny_gpt2(vocab_size=64).base_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 64 tokens and the network in training 128"):
        meta(meta_weight_model=str(tmp_path))
    with pytest.raises(ValueError, match="use MetaTokenWeightingCausalLM"):
        CausalLM(tiny_llama(), objectives=[MetaTokenWeighting()])
    module, batch = meta(), batch_of(4)
    with pytest.raises(ValueError, match="has 4 documents and meta_documents=3"):
        module.terms(batch, counts_of(module, batch))
    del batch["documents"]
    with pytest.raises(ValueError, match="no documents"):
        module.terms(batch, counts_of(module, batch))


def test_other_objectives_act_on_the_outer_loss():
    """The questions' tokens weighted by their probability, after the inner steps."""
    plain, both = meta(meta_locality=0.0), meta(meta_locality=0.0, objectives=[DynamicFineTuning()])
    batch = batch_of()
    nll = plain.terms(batch, counts_of(plain, batch)).units.nll
    terms = both.terms(batch, counts_of(both, batch))
    torch.testing.assert_close(terms.loss.detach(), (torch.exp(-nll) * nll).sum() / len(nll))
    terms.loss.backward()
    assert float(both.token_weights.outer.weight.grad.abs().max()) > 0
