"""What a run logs: each term and statistic under a name of its own, exact, from the pass that made the loss."""

from __future__ import annotations

import pytest
import torch
import torchmetrics
from torch.nn import functional as F

from lightning_peft.datamodules import LookAheadDataLoader
from lightning_peft.models import CausalLM
from lightning_peft.objectives import DynamicFineTuning, SelfConstrained
from lightning_peft.objectives.objective import Objective
from tests.models.test_causal_lm import batch_of, counts_of, quiet_trainer, rows
from tests.tiny import tiny_llama


class Shrink(Objective):
    """A term beside the output head: the mean square of the hidden states' first number."""

    def counts(self, module, batch):
        return {"shrink": len(batch["labels"])}

    def auxiliary_losses(self, module, batch, outputs):
        return {"shrink": 0.1 * module.model.lm_head.weight[:, 0].square().sum() * len(batch["labels"])}


def module_of(*objectives: Objective) -> CausalLM:
    network = tiny_llama()
    with torch.no_grad():
        network.lm_head.weight.mul_(20)  # probabilities that differ
    return CausalLM(network, objectives=list(objectives), learning_rate=1e-2)


def test_every_term_and_statistic_has_its_own_name_and_value(tmp_path):
    module = module_of(DynamicFineTuning(), SelfConstrained(nsc_weight=0.5), Shrink())
    start = module_of().model
    loader = torch.utils.data.DataLoader(rows(10), batch_size=4, collate_fn=batch_of)
    trainer = quiet_trainer(tmp_path, max_steps=3)
    trainer.fit(module, LookAheadDataLoader(rows(12), batch_size=4, collate_fn=batch_of), loader)
    terms = {"loss", "nll", "weight", "reference_kl", "shrink"}
    expected = {f"train_{name}" for name in terms}
    expected |= {f"val_{name}" for name in (*terms, "perplexity", "accuracy")}
    assert set(trainer.callback_metrics) == expected

    # Each value from whole logits, over all batches at once.
    made = {
        name.removeprefix("val_"): float(value) for name, value in trainer.callback_metrics.items() if "val_" in name
    }
    batch, network = batch_of(rows(10)), module.model.eval()
    labels = batch["labels"][:, 1:]
    learnt = labels != -100
    with torch.no_grad():
        log_p, log_q = (one.eval()(**batch).logits[:, :-1][learnt].log_softmax(-1) for one in (network, start))
    nll = F.nll_loss(log_p, labels[learnt], reduction="none")
    p = nll.neg().exp()
    truth = {
        "loss": (p * nll).mean(),
        "nll": nll.mean(),
        "weight": p.mean(),
        "reference_kl": F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean(),
        "shrink": 0.1 * network.lm_head.weight[:, 0].detach().square().sum(),
        "perplexity": nll.mean().exp(),
        "accuracy": (log_p.argmax(-1) == labels[learnt]).float().mean(),
    }
    assert made == pytest.approx({name: float(value) for name, value in truth.items()}, rel=1e-4)
    assert len({round(value, 6) for value in made.values()}) == len(made), "two names for one value would hide a mix-up"
    # Kept by torchmetrics, one metric a name.
    assert set(module.metrics) == {name for name in expected if name.startswith("val_")}
    assert all(isinstance(metric, torchmetrics.Metric) for metric in module.metrics.values())


def test_perplexity_and_accuracy_come_from_the_losss_own_pass(tmp_path):
    module = module_of(DynamicFineTuning())
    loader = torch.utils.data.DataLoader(rows(10), batch_size=4, collate_fn=batch_of)
    passes: list[int] = []
    module.model.model.register_forward_hook(lambda *_: passes.append(1))
    quiet_trainer(tmp_path).validate(module, loader, verbose=False)
    assert len(passes) == len(loader)


def test_one_name_for_two_terms_is_refused():
    batch = batch_of(rows(2))
    for objectives, message in (
        ([SelfConstrained(nsc_weight=0.1), SelfConstrained(nsc_weight=0.5)], "adds a term named 'reference_kl'"),
        ([Shrink(), Shrink()], "Shrink adds a term named 'shrink' and there is one already"),
    ):
        module = module_of(*objectives)
        with pytest.raises(ValueError, match=message):
            counts_of(module, batch)
    # One that adds nothing may stand beside.
    counts_of(module_of(SelfConstrained(nsc_weight=0.0), SelfConstrained(nsc_weight=0.5)), batch)


@pytest.mark.parametrize("name", ["loss", "nll", "weight"])
def test_the_main_losss_names_are_taken(name):
    class Other(Shrink):
        def counts(self, module, batch):
            return {name: 1}

    with pytest.raises(ValueError, match=f"Other adds a term named '{name}' and there is one already"):
        counts_of(module_of(Other()), batch_of(rows(2)))
