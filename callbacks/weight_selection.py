"""The base of techniques that choose which of a network's own weights train, and when the choice moves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_peft.checkpoint import resumed_callback_state
from lightning_peft.optimizer_groups import OptimizerGroups
from lightning_peft.roles import Weight, weights_by_role
from lightning_peft.when_built import forget, when_built

RESELECT = ("stage", "epoch", "never")


class WeightSelection(L.Callback):
    """Trains a choice of the network's weights, on any LightningModule. A subclass answers `select`; the rest is here.

    The choice is made before the strategy wraps the network and before optimizers exist. It is a function of the round
    alone, so every rank makes the same one; the round is in the checkpoint. When it moves, parameters that stay keep
    their optimizer state, those that leave lose it, and learning-rate schedules go on (FINDINGS, 4). Weights that are
    not the selection's to choose keep the `requires_grad` they had.

    Args:
        reselect: "stage" (each new `fit`), "epoch" or "never".
        picture: Write a map of what trains, by block and role, beside the checkpoints.

    Raises:
        ValueError: Another selection owns a weight, the network lacks what is selected, or the checkpoint is another's.
    """

    def __init__(self, reselect: str = "stage", picture: bool = False) -> None:
        if reselect not in RESELECT:
            raise ValueError(f"reselect={reselect!r} is not known: use one of {RESELECT}.")
        self.reselect, self.picture = reselect, picture
        self.round = 0
        self.rounds_trained: dict[str, int] = {}  # weight -> rounds in which it trained
        self._stages_done = 0
        self._selected: set[str] = set()
        self._candidates: set[str] = set()
        self._before: dict[str, bool] = {}
        self._groups: OptimizerGroups | None = None

    # -- what a technique says ------------------------------------------------------------------------------------

    @abstractmethod
    def candidates(self, weights: list[Weight]) -> set[str]:
        """Names of the weights that this technique decides about. Raise if the network lacks what it needs."""

    @abstractmethod
    def select(self, weights: list[Weight], round: int) -> set[str]:
        """Names of the candidates that train in this round, a pure function of its arguments."""

    def arguments(self) -> dict[str, Any]:
        """What makes two of these callbacks different, JSON values; part of the key of their state."""
        return {"reselect": self.reselect}

    # -- state ----------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**self.arguments())

    def state_dict(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "stages_done": self._stages_done,
            "selected": sorted(self._selected),
            "rounds_trained": self.rounds_trained,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._groups is None and not self._before:
            self._take(state_dict)  # outside of fit: nothing to compare with
        elif set(state_dict["selected"]) != self._selected or state_dict["round"] != self.round:
            raise ValueError(
                f"{type(self).__name__}: the checkpoint trains other weights in round {state_dict['round']} than this "
                f"run would in round {self.round}: it comes from another network or other arguments."
            )

    def _take(self, state: dict[str, Any]) -> None:
        self.round, self._stages_done = state["round"], state["stages_done"]
        self.rounds_trained = dict(state["rounds_trained"])

    # -- fit ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        launcher = trainer.strategy.launcher
        if (
            launcher is not None
            and launcher.is_interactive_compatible is not False
            and "Multi" in type(launcher).__name__
        ):
            raise ValueError(
                f"{type(self).__name__} does not work with strategy={type(trainer.strategy).__name__} started by "
                f"{type(launcher).__name__}: the parent process would not see what trained. Use strategy='ddp'."
            )
        resumed = resumed_callback_state(trainer, self.state_key)
        if resumed is not None:
            self._take(resumed)
        elif self._stages_done and self.reselect == "stage":
            self.round += 1
        self._groups = OptimizerGroups(pl_module)
        when_built(pl_module, self._begin)

    def _begin(self, pl_module: L.LightningModule) -> None:
        weights = weights_by_role(pl_module)
        self._candidates = self.candidates(weights)
        parameters = dict(pl_module.named_parameters())
        for name in sorted(self._candidates):
            if not parameters[name].is_floating_point():
                raise ValueError(
                    f"{type(self).__name__}: {name} is stored in {parameters[name].dtype} (quantised) and cannot "
                    "train in place: load the network unquantised, or add weights with callbacks.PEFT."
                )
        owners = pl_module.__dict__.setdefault("_weight_owners", {})
        taken = sorted(name for name in self._candidates if owners.get(name, self) is not self)
        if taken:
            raise ValueError(
                f"{type(self).__name__} and {type(owners[taken[0]]).__name__} would both choose whether {taken[0]} "
                f"trains ({len(taken)} weights in common): keep one of the two callbacks."
            )
        owners.update(dict.fromkeys(self._candidates, self))
        self._before = {name: parameters[name].requires_grad for name in self._candidates}
        self._choose(pl_module, weights)
        assert self._groups is not None
        self._groups.watch(self._candidates, lambda: self._selected)

    def _choose(self, pl_module: L.LightningModule, weights: list[Weight]) -> None:
        self._selected = self.select(weights, self.round)
        if not self._selected:
            raise ValueError(
                f"{type(self).__name__} selects no weight in round {self.round}: nothing of it would train."
            )
        for name, parameter in pl_module.named_parameters():
            if name in self._candidates:
                parameter.requires_grad_(name in self._selected)
                if name not in self._selected:
                    parameter.grad = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning does not call this when it resumes in mid-epoch: the checkpoint's round is then the epoch's own.
        if self.reselect == "epoch" and trainer.current_epoch > 0:
            self.move(trainer, pl_module)

    def move(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Goes on to the next round: chooses again, edits the optimizers in place, and lets DDP see what trains."""
        self.round += 1
        self._choose(pl_module, weights_by_role(pl_module))
        assert self._groups is not None
        self._groups.apply(trainer.optimizers)
        if isinstance(trainer.strategy.model, nn.parallel.DistributedDataParallel):
            # DDP reduces what required a gradient when it wrapped; it would drift without a word (ARCHITECTURE, 3).
            trainer.strategy.model = trainer.strategy._setup_model(pl_module)
        self._count(trainer, pl_module)

    def _count(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (trainer.train_dataloader is not None and trainer.fit_loop.restarted_mid_epoch):
            for name in self._selected:
                self.rounds_trained[name] = self.rounds_trained.get(name, 0) + 1
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in pl_module.parameters())
        rank_zero_info(f"{type(self).__name__}: round {self.round} trains {trained:,} of {total:,} parameters")
        for logger in trainer.loggers:
            logger.log_metrics(
                {"trainable_parameters": trained, "trainable_fraction": trained / total}, step=trainer.global_step
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stages_done += 1
        if self.picture and trainer.is_global_zero:
            self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """A map of block x role: the share of rounds in which each weight trained. Returns the PNG's path."""
        from lightning_peft.pictures import new_figure, write_picture

        weights = [w for w in weights_by_role(pl_module) if w.block is not None and not w.is_bias]
        roles = list(dict.fromkeys(w.role for w in weights))
        blocks = list(dict.fromkeys(w.block for w in weights))
        table: list[list[list[float]]] = [[[] for _ in roles] for _ in blocks]
        for w in weights:
            share = self.rounds_trained.get(w.name, 0) / (self.round + 1)
            table[blocks.index(w.block)][roles.index(w.role)].append(share)
        figure, axes = new_figure(1 + 0.7 * len(roles), 1.5 + 0.25 * len(blocks))
        values = [[sum(cell) / len(cell) if cell else float("nan") for cell in row] for row in table]
        image = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks(range(len(roles)), roles, rotation=45, ha="right")
        axes.set_yticks(range(len(blocks)), [str(i) for i in range(len(blocks))])
        axes.set(
            ylabel="block", title=f"{type(self).__name__}: share of {self.round + 1} rounds in which a weight trained"
        )
        figure.colorbar(image)
        return write_picture(trainer, figure, type(self).__name__.lower(), None)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        forget(pl_module)
        if self._groups is not None:
            self._groups.release()
            self._groups = None
        owners: dict[str, Callable[..., Any]] = pl_module.__dict__.get("_weight_owners", {})
        for name, parameter in pl_module.named_parameters():
            if name in self._before:
                parameter.requires_grad_(self._before[name])
                owners.pop(name, None)
        if not owners:
            pl_module.__dict__.pop("_weight_owners", None)
        self._before, self._candidates = {}, set()
