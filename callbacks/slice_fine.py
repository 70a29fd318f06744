"""SliceFine: a few columns or rows of each matrix train, and the place moves on (arXiv 2510.08513)."""

from __future__ import annotations

import random
import re
from typing import Any

from lightning_peft.adapters.configuration import TASK_HEADS, closest
from lightning_peft.callbacks.weight_selection import WeightSelection
from lightning_peft.parts import Part
from lightning_peft.roles import Weight

ORIENTATIONS = ("column", "row", "alternate")
ORDERS = ("sweep", "random", "fixed")
OPTIMIZER_STATES = ("reset", "carry")


def slice_start(
    order: str, turn: int, rank: int, size: int, start: int | None = 0, seed: int = 0, name: str = ""
) -> int:
    """The first column or row of the slice that trains in a turn: of `size`, and counted modulo it.

    Args:
        order: "sweep" (one slice after the other), "random" (anywhere) or "fixed" (where it began).
        turn: How often slices of this orientation have trained before.
        rank: Columns or rows in a slice.
        size: Columns or rows of the matrix.
        start: Where the first slice begins; None draws it for each matrix.
        seed: Seed of what is drawn; with `name` and `turn` it decides, so that all ranks draw alike.
        name: The matrix.
    """
    if order == "random":
        return random.Random(f"{seed}:{name}:{turn}").randrange(size)
    first = random.Random(f"{seed}:{name}").randrange(size) if start is None else start
    return (first + (turn * rank if order == "sweep" else 0)) % size


class SliceFine(WeightSelection):
    """Trains `rank` neighbouring columns or rows of every linear layer's matrix, and after each interval others.

    What a slice has learned stays when the next one trains: W = W_0 + the updates of all slices so far. No weights are
    added; gradients and optimizer state have the slices' size, and what is saved or exported is the plain network.

    At a move the moments of the slice start at zero and the learning-rate schedule goes on. What the authors do with
    the moments is in no text or code that could be found: `optimizer_state` is our choice. At the edge of a matrix a
    slice goes on at the other side (the paper leaves it open), so that all slices have one size.

    Columns are a layer's inputs and rows its outputs, however it stores them (GPT-2 transposed). The output head is
    never sliced. A classification head trains whole, as with PEFT; everything else is frozen.

    Args:
        rank: Columns or rows in a slice; 1 is often enough, 8 is much.
        orientation: "column", "row", or "alternate": a block of columns, then one of rows, and so on.
        interval: Optimizer steps until the slices move.
        order: "sweep" from slice to slice, "random" places, or "fixed" where they begin.
        target_modules: As in PEFT: names of linear layers, a regular expression, or "all-linear".
        start: First column or row of the first slices; null draws it for each matrix.
        optimizer_state: At a move, "reset" the slices' moments or "carry" them over to the new places.
        train_bias: Train the layers' biases too.
        modules_to_save: Modules that train whole; by default a classification head. An empty list is none.
        seed: Seed of what is drawn.
        picture: Write a map of how much of each matrix has trained, by block and role, beside the checkpoints.

    Raises:
        ValueError: An argument is out of range, a name matches no linear layer, a slice is larger than a matrix, or the
            network is quantised.
    """

    needs_blocks = False
    share_means = "share of a weight that has trained after {rounds} rounds"

    def __init__(
        self,
        rank: int = 1,
        orientation: str = "column",
        interval: int = 500,
        order: str = "sweep",
        target_modules: str | list[str] = "all-linear",
        start: int | None = 0,
        optimizer_state: str = "reset",
        train_bias: bool = False,
        modules_to_save: list[str] | None = None,
        seed: int = 0,
        picture: bool = False,
    ) -> None:
        super().__init__(picture=picture, interval=interval)
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1: it is the number of columns or rows of a slice.")
        if start is not None and start < 0:
            raise ValueError(f"start={start} must be 0 or more, or null for a place drawn for each matrix.")
        for argument, given, known in (
            ("orientation", orientation, ORIENTATIONS),
            ("order", order, ORDERS),
            ("optimizer_state", optimizer_state, OPTIMIZER_STATES),
        ):
            if given not in known:
                raise ValueError(f"{argument}={given!r} is not known: use one of {known}.")
        if optimizer_state == "carry" and orientation == "alternate":
            raise ValueError(
                "optimizer_state='carry' does not go with orientation='alternate': a column's moments are no row's. "
                "Use 'reset'."
            )
        self.rank, self.orientation, self.order, self.start, self.seed = rank, orientation, order, start, seed
        self.target_modules, self.modules_to_save = target_modules, modules_to_save
        self.optimizer_state, self.train_bias = optimizer_state, train_bias
        self.shapes_repeat = 2 if orientation == "alternate" else 1

    def arguments(self) -> dict[str, Any]:
        names = ("rank", "orientation", "interval", "order", "target_modules", "start", "optimizer_state", "train_bias")
        return {name: getattr(self, name) for name in (*names, "modules_to_save", "seed")}

    # -- what trains ----------------------------------------------------------------------------------------------

    def candidates(self, weights: list[Weight]) -> set[str]:
        self.targets(weights)
        for name in self.modules_to_save or []:
            if not any(_in_module(weight, name) for weight in weights):
                parts = {part for weight in weights for part in weight.name.split(".")[:-1] if not part.isdigit()}
                raise ValueError(f"modules_to_save: there is no module named {name!r}; {closest(name, parts)}.")
        return {weight.name for weight in weights if weight.role not in ("adapter", "beside")}

    def select(self, weights: list[Weight], round: int) -> set[str]:
        chosen = {weight.name for weight in weights if self._whole(weight)}
        if self.train_bias:
            layers = {_layer(weight) for weight in self.targets(weights)}
            chosen |= {weight.name for weight in weights if weight.is_bias and _layer(weight) in layers}
        return chosen

    def parts(self, weights: list[Weight], round: int) -> dict[str, Part]:
        turn, columns = round, self.orientation == "column"
        if self.orientation == "alternate":
            turn, columns = round // 2, round % 2 == 0
        return {weight.name: self.slice_of(weight, turn, columns) for weight in self.targets(weights)}

    def slice_of(self, weight: Weight, turn: int, columns: bool) -> Part:
        """The slice of a matrix that trains in a turn.

        Raises:
            ValueError: It is larger than the matrix.
        """
        dim = 1 if columns == (weight.layout == "out_in") else 0
        size = weight.shape[dim]
        if self.rank > size:
            raise ValueError(
                f"rank={self.rank} is more than the {size} {'columns' if columns else 'rows'} of {weight.name}: use a "
                "smaller rank, or leave the layer out of target_modules."
            )
        start = slice_start(self.order, turn, self.rank, size, self.start, self.seed, weight.name)
        return Part.block(dim, start, self.rank, size)

    def targets(self, weights: list[Weight]) -> list[Weight]:
        """The matrices that are sliced.

        Raises:
            ValueError: There are none, or a name matches none.
        """
        linear = [w for w in weights if w.layout and w.role not in ("adapter", "head", "beside") and not self._whole(w)]
        if self.target_modules == "all-linear":
            wanted = [""]
            matched = {"": linear}
        else:
            wanted = [self.target_modules] if isinstance(self.target_modules, str) else list(self.target_modules)
            plain = not isinstance(self.target_modules, str)
            patterns = {name: re.compile(rf"(.*\.)?(?:{re.escape(name) if plain else name})") for name in wanted}
            matched = {name: [w for w in linear if patterns[name].fullmatch(_layer(w))] for name in wanted}
        for name in wanted:
            if not matched[name]:
                known = {_layer(weight).rpartition(".")[2] for weight in linear}
                raise ValueError(
                    f"target_modules={self.target_modules!r}: no linear layer matches {name or 'it'!r} (the output "
                    f"head is never sliced, use modules_to_save); {closest(name, known) if known else 'there is none'}."
                )
        chosen = {weight.name for found in matched.values() for weight in found}
        return [weight for weight in linear if weight.name in chosen]

    def _whole(self, weight: Weight) -> bool:
        """Whether the weight is of a module that trains whole."""
        if self.modules_to_save is not None:
            return any(_in_module(weight, name) for name in self.modules_to_save)
        heads = {name for names in TASK_HEADS.values() for name in names}
        return weight.role == "head" and any(_in_module(weight, name) for name in heads)

    def share(self, weight: Weight) -> float:
        """How much of a matrix has trained so far; 1 for what trains whole."""
        if weight.name not in self._parts:
            return float(weight.name in self._selected)
        turns = range(self.round + 1)
        if self.orientation == "alternate":
            columns = self._visited(weight, range(self.round // 2 + 1), True)
            return 1 - (1 - columns) * (1 - self._visited(weight, range((self.round + 1) // 2), False))
        return self._visited(weight, turns, self.orientation == "column")

    def _visited(self, weight: Weight, turns: range, columns: bool) -> float:
        size = weight.shape[1 if columns == (weight.layout == "out_in") else 0]
        if self.order == "fixed":
            turns = turns[:1]
        places = {p for turn in turns for p in self.slice_of(weight, turn, columns).index.tolist()}
        return len(places) / size


def _layer(weight: Weight) -> str:
    return weight.name.rpartition(".")[0]


def _in_module(weight: Weight, name: str) -> bool:
    return f".{name}." in f".{weight.name}"
