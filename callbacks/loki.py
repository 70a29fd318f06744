"""LoKI: only the feed-forward neurons that general answers need least are trained (arXiv 2505.22120, paper 21)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_peft.attribution.knowledge_vectors import (
    BASELINES,
    METHOD,
    down_weights,
    lowest_nodes,
    question_scores,
)
from lightning_peft.callbacks.weight_selection import WeightSelection
from lightning_peft.parts import Part
from lightning_peft.roles import Weight, inner_model
from lightning_peft.scores import load_scores, save_scores


class LoKI(WeightSelection):
    """Trains, of every feed-forward down projection, the rows whose knowledge-vector attribution is lowest.

    Each block gives the same number of rows. Biases train with their rows, everything else stays; the trained network
    has its old form. Scores come from a file (`lightning-peft select --method knowledge-vectors`), or are made before
    the fit from `questions` of general ability, such as MMLU's. A resumed run takes its rows from the checkpoint.

    Not built: LoKI*, which trains the rows by a product of two thin matrices.

    Args:
        quota: Share of the rows of every down projection, in percent; the paper has 10, 20 and 30.
        scores: The file of scores; with `questions` it is where they are kept, and read if it is there.
        questions: Texts that end where an answer begins, or their token ids, to make scores from.
        steps: Steps of the integral.
        baseline: Where the integral begins: "zero" (the paper) or "token0" (the authors' code).
        batch_size: Questions scored at once.
        tokenizer: Of the questions: name or folder; by default that of the LightningModule.
        picture: Write a map of how much of each matrix trained, by block and role, beside the checkpoints.

    Raises:
        FileNotFoundError: There is no such file of scores, and no questions to make it from.
        ValueError: An argument is out of range, the scores are another network's, or the network has no down
            projections or is quantised.
    """

    share_means = "share of a weight that trained"

    def __init__(
        self,
        quota: float = 10.0,
        scores: str | None = None,
        questions: list[str] | list[list[int]] | None = None,
        steps: int = 7,
        baseline: str = "zero",
        batch_size: int = 4,
        tokenizer: str | None = None,
        picture: bool = False,
    ) -> None:
        super().__init__("never", picture)
        if not 0 < quota <= 100:
            raise ValueError(f"quota={quota} must be a percentage in (0, 100].")
        if scores is None and not questions:
            raise ValueError(
                "LoKI needs scores=, a file of `lightning-peft select --method knowledge-vectors`, or questions= to "
                "make them from."
            )
        if steps < 2 or baseline not in BASELINES or batch_size < 1:
            raise ValueError(
                f"steps={steps}, baseline={baseline!r}, batch_size={batch_size}: at least 2 steps, one of {BASELINES}, "
                "and at least 1 question at once."
            )
        self.quota, self.scores, self.questions = quota, scores, questions
        self.steps, self.baseline, self.batch_size, self.tokenizer = steps, baseline, batch_size, tokenizer
        self._rows: dict[str, Tensor] = {}  # down matrix -> rows that train
        self._resumed = False

    def arguments(self) -> dict[str, Any]:
        return {"quota": self.quota, "baseline": self.baseline, "steps": self.steps}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rows": dict(self._rows)}

    def _take(self, state: dict[str, Any]) -> None:
        super()._take(state)
        self._rows = dict(state["rows"])

    def candidates(self, weights: list[Weight]) -> set[str]:
        downs = {w.name: w for w in down_weights(weights)}
        if not self._rows:
            scores = self._scores()
            chosen = lowest_nodes([scores[name] for name in downs], self.quota)
            self._rows = dict(zip(downs, chosen))
        for name, rows in self._rows.items():
            size = downs[name].shape[0 if downs[name].layout == "out_in" else 1] if name in downs else 0
            if int(rows.max()) >= size:
                raise ValueError(f"LoKI: the checkpoint trains rows of {name} which this network has not.")
        return {w.name for w in weights if w.role not in ("adapter", "beside")}

    def parts(self, weights: list[Weight], round: int) -> dict[str, Part]:
        made, layers = {}, {}
        for weight in down_weights(weights):
            rows = self._rows[weight.name]
            made[weight.name] = Part(0 if weight.layout == "out_in" else 1, rows)
            layers[weight.name.rpartition(".")[0]] = rows
        for weight in weights:
            if weight.is_bias and weight.name.rpartition(".")[0] in layers:
                made[weight.name] = Part(0, layers[weight.name.rpartition(".")[0]])
        return made

    def share(self, weight: Weight) -> float:
        return len(self._rows[weight.name]) / max(weight.shape[:2]) if weight.name in self._rows else 0.0

    # -- scores ---------------------------------------------------------------------------------------------------

    def _scores(self) -> dict[str, Tensor]:
        assert self._module is not None
        network = inner_model(self._module)
        inside = next((f"{name}." for name, module in self._module.named_modules() if module is network and name), "")
        if self.scores is not None and (Path(self.scores).is_file() or not self.questions):
            found, _ = load_scores(self.scores, network, METHOD)
        else:
            found = self._made(network)
            if self.scores is not None and (self._trainer is None or self._trainer.is_global_zero):
                save_scores(self.scores, found, network, METHOD, steps=self.steps, baseline=self.baseline)
        return {f"{inside}{name}": value for name, value in found.items()}

    def _made(self, network: Any) -> dict[str, Tensor]:
        trainer: L.Trainer | None = self._trainer
        questions = [q if isinstance(q, list) else self._tokenizer()(q)["input_ids"] for q in self.questions or []]
        if trainer is not None:
            network.to(trainer.strategy.root_device)
        rank_zero_info(f"LoKI: attributing {len(questions)} questions to the nodes of every layer")
        # On each rank all of them: the ranks' networks are the same, and so are their scores. For many questions make
        # the file first.
        settings = (self.steps, self.baseline, self.batch_size)
        return question_scores(network, questions, *settings, progress=None)

    def _tokenizer(self) -> Any:
        from lightning_peft.models.pretrained import load_tokenizer

        given = self.tokenizer or getattr(self._module, "tokenizer", None)
        if given is None:
            raise ValueError("LoKI makes scores from texts and has no tokenizer: give tokenizer=, or token ids.")
        return load_tokenizer(given) if isinstance(given, str) else given
