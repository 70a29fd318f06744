"""ESFT: of a mixture of experts, the experts that the task's tokens go to are trained (arXiv 2407.01906, paper 116)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_peft.attribution.expert_routing import (
    METHOD,
    SCORES,
    TOKENS,
    drawn,
    expert_layers,
    relevant_experts,
    routing_scores,
)
from lightning_peft.callbacks.weight_selection import WeightSelection
from lightning_peft.parts import Part
from lightning_peft.roles import Weight, inner_model
from lightning_peft.scores import load_scores, save_scores

#: Of each score, the p of the paper.
TOP_P = {"token": 0.2, "gate": 0.1}


class ExpertSpecialized(WeightSelection):
    """Trains, in each layer of routed experts, the fewest whose scores on the task sum to `top_p`; the rest is frozen.

    Experts in one tensor (transformers 5) train as blocks of its first dimension, with gradients and optimizer state of
    the blocks' size; experts in a list of modules train whole. The trained network has its old form.

    Scores come from a file (`lightning-peft select --method expert-routing`), or are made before the fit from `probe`,
    texts of the task: sequences are drawn until there are `probe_tokens`, shared out to the ranks, and the ranks' sums
    are added, so that all choose alike. A resumed run takes its experts from the checkpoint.

    The paper trains at a constant 1e-5 for 500 steps of 32 sequences, with AdamW (0.9, 0.95), weight decay 0.1 and
    gradients clipped at 1.

    Args:
        score: "token" (how often an expert is picked) or "gate" (with what gate value).
        top_p: Sum of scores that each layer's experts reach; by default the paper's 0.2 for "token", 0.1 for "gate".
        scores: The file of scores; with `probe` it is where they are kept, and read if it is there.
        probe: Texts of the task, or their token ids, to make scores from.
        probe_tokens: How many tokens of them are enough.
        train_shared_experts: Train the experts that every token goes to, too.
        train_non_expert_modules: Train all that is no expert, too: attention, norms, embeddings, head and, as in the
            authors' code, routers.
        seed: Of the order in which sequences are drawn.
        tokenizer: Of the probe: name or folder; by default that of the LightningModule.
        picture: Write a map of each expert's score by layer, with the trained ones marked, beside the checkpoints.

    Raises:
        FileNotFoundError: There is no such file of scores, and no probe to make it from.
        ValueError: An argument is out of range, the scores are another network's, or the network is dense, has no
            shared experts, or is quantised.
    """

    def __init__(
        self,
        score: str = "token",
        top_p: float | None = None,
        scores: str | None = None,
        probe: list[str] | list[list[int]] | None = None,
        probe_tokens: int = TOKENS,
        train_shared_experts: bool = False,
        train_non_expert_modules: bool = False,
        seed: int = 0,
        tokenizer: str | None = None,
        picture: bool = False,
    ) -> None:
        super().__init__("never", picture)
        if score not in SCORES:
            raise ValueError(f"score={score!r} is not known: use one of {SCORES}.")
        top_p = TOP_P[score] if top_p is None else top_p
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must lie in (0, 1]: it is the sum of scores that the experts reach.")
        if probe_tokens < 1:
            raise ValueError(f"probe_tokens={probe_tokens} must be at least 1.")
        if scores is None and not probe:
            raise ValueError(
                f"ExpertSpecialized needs scores=, a file of `lightning-peft select --method {METHOD}`, or probe=, "
                "texts of the task, to make them from."
            )
        self.score, self.top_p, self.scores = score, top_p, scores
        self.probe, self.probe_tokens, self.seed, self.tokenizer = probe, probe_tokens, seed, tokenizer
        self.train_shared_experts, self.train_non_expert_modules = train_shared_experts, train_non_expert_modules
        self._experts: dict[str, Tensor] = {}  # module of experts -> those that train
        self._load: dict[str, Tensor] = {}  # module of experts -> the score of each

    def arguments(self) -> dict[str, Any]:
        names = ("score", "top_p", "train_shared_experts", "train_non_expert_modules")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "experts": dict(self._experts), "load": dict(self._load)}

    def _take(self, state: dict[str, Any]) -> None:
        super()._take(state)
        self._experts, self._load = dict(state["experts"]), dict(state["load"])

    # -- what trains ----------------------------------------------------------------------------------------------

    def candidates(self, weights: list[Weight]) -> set[str]:
        layers = expert_layers(weights)
        if not self._experts:
            row, scores = SCORES.index(self.score), self._scores()
            self._load = {name: scores[name][row] for name in layers}
            self._experts = {
                name: relevant_experts(load, self.top_p).sort().values for name, load in self._load.items()
            }
        for name, experts in self._experts.items():
            if name not in layers or int(experts.max()) >= layers[name].number:
                raise ValueError(
                    f"ExpertSpecialized: the checkpoint trains experts of {name} which this network lacks."
                )
        if self.train_shared_experts and not any(_is_shared_expert(weight) for weight in weights):
            raise ValueError("train_shared_experts=True: this network has no shared experts; leave it False.")
        return {weight.name for weight in weights if weight.role not in ("adapter", "beside")}

    def select(self, weights: list[Weight], round: int) -> set[str]:
        chosen = set()
        for name, layer in expert_layers(weights).items():
            mine = set(self._experts[name].tolist())
            chosen |= {weight for weight, expert in layer.single.items() if expert in mine}
        for weight in weights:
            if weight.role in ("adapter", "beside") or weight.role.startswith("expert."):
                continue
            if self.train_shared_experts if _is_shared_expert(weight) else self.train_non_expert_modules:
                chosen.add(weight.name)
        return chosen

    def parts(self, weights: list[Weight], round: int) -> dict[str, Part]:
        layers = expert_layers(weights)
        return {weight: Part(0, self._experts[name]) for name, layer in layers.items() for weight in layer.fused}

    # -- scores ---------------------------------------------------------------------------------------------------

    def _scores(self) -> dict[str, Tensor]:
        assert self._module is not None
        network = inner_model(self._module)
        inside = next((f"{name}." for name, module in self._module.named_modules() if module is network and name), "")
        there = self.scores is not None and (Path(self.scores).is_file() or not self.probe)
        if self._trainer is not None:  # all ranks read, or all take part in the sum
            there = self._trainer.strategy.broadcast(there)
        if there:
            assert self.scores is not None
            found, _ = load_scores(self.scores, network, METHOD)
        else:
            found = self._made(network)
            if self.scores is not None and (self._trainer is None or self._trainer.is_global_zero):
                save_scores(self.scores, found, network, METHOD, probe_tokens=self.probe_tokens, seed=self.seed)
        return {f"{inside}{name}": value for name, value in found.items()}

    def _made(self, network: Any) -> dict[str, Tensor]:
        probe = [text if isinstance(text, list) else self._tokenizer()(text)["input_ids"] for text in self.probe or []]
        sequences = drawn(probe, self.probe_tokens, self.seed)
        rank_zero_info(f"ExpertSpecialized: routing {len(sequences)} of {len(probe)} sequences through the network")
        trainer: L.Trainer | None = self._trainer
        if trainer is None:
            return routing_scores(network, sequences)
        network.to(trainer.strategy.root_device)

        def add(sums: Tensor) -> Tensor:
            on_device = sums.to(trainer.strategy.root_device)
            return trainer.strategy.reduce(on_device, reduce_op="sum").cpu()  # type: ignore[union-attr]

        ranks = (trainer.global_rank, trainer.world_size)
        return routing_scores(network, sequences, *ranks, add=add if trainer.world_size > 1 else None)

    def _tokenizer(self) -> Any:
        from lightning_peft.models.pretrained import load_tokenizer

        given = self.tokenizer or getattr(self._module, "tokenizer", None)
        if given is None:
            raise ValueError(
                "ExpertSpecialized makes scores from texts and has no tokenizer: give tokenizer=, or token ids."
            )
        return load_tokenizer(given) if isinstance(given, str) else given

    # -- picture --------------------------------------------------------------------------------------------------

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """A map of layer x expert of the scores, with a mark on every expert that trained. Returns the PNG's path."""
        from lightning_peft.pictures import new_figure, write_picture

        width = max(len(load) for load in self._load.values())
        table = torch.full((len(self._load), width), float("nan"), dtype=torch.float64)
        for row, load in enumerate(self._load.values()):
            table[row, : len(load)] = load
        figure, axes = new_figure(2 + 0.14 * max(width, 24), 1.5 + 0.25 * len(self._load))
        image = axes.imshow(table.numpy(), aspect="auto", cmap="viridis", vmin=0)
        marks = [(expert, row) for row, name in enumerate(self._load) for expert in self._experts[name].tolist()]
        axes.scatter(*zip(*marks), marker="s", s=14, facecolors="none", edgecolors="red")
        blocks = [next(iter(re.findall(r"\.(\d+)\.", name)), str(row)) for row, name in enumerate(self._load)]
        axes.set_yticks(range(len(blocks)), blocks)
        title = f"{self.score} score of each expert; marked: trained (p = {self.top_p})"
        axes.set(xlabel="expert", ylabel="layer", title=title)
        figure.colorbar(image)
        return write_picture(trainer, figure, "expertspecialized", None)


def _is_shared_expert(weight: Weight) -> bool:
    """Whether a weight is of an expert that every token goes to; the gate that scales it is a router's."""
    return bool(re.search(r"(^|\.)shared_(experts?|mlp)\.", weight.name)) and weight.role.startswith("ffn.")
