"""The base of techniques that choose which of a network's own weights train, and when the choice moves."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_peft.checkpoint import resumed_callback_states, resumed_weights
from lightning_peft.host_copies import reshard
from lightning_peft.optimizer_groups import OptimizerGroups
from lightning_peft.parts import Part, PartLeaf, leaf_name, write_back
from lightning_peft.roles import Weight, weights_by_role
from lightning_peft.when_built import forget, when_built

RESELECT = ("stage", "epoch", "never")


class WeightSelection(L.Callback):
    """Trains a choice of the network's weights, on any LightningModule. A subclass answers `select` or `parts`.

    The choice is made before the strategy wraps the network and before optimizers exist. It is a function of the round
    alone, so every rank makes the same one; the round is in the checkpoint. When it moves, parameters that stay keep
    their optimizer state, those that leave lose it, and learning-rate schedules go on (FINDINGS, 4). Weights that are
    not the selection's to choose keep the `requires_grad` they had.

    Of a weight that trains in part, the part alone has a gradient and optimizer state; weight decay does not reach the
    rest. The part's values stand in the weight itself after every optimizer step, and checkpoints hold the weight.

    Args:
        reselect: When a new round begins: "stage" (each new `fit`), "epoch" or "never".
        picture: Write a map of what trains, by block and role, beside the checkpoints.
        interval: Begin a new round after so many optimizer steps (as `trainer.global_step` counts them) instead.

    Raises:
        ValueError: Another selection owns a weight, the network lacks what is selected, the strategy hides its
            parameters, or the checkpoint is another's.
    """

    #: Whether the technique asks for transformer blocks, or takes any network.
    needs_blocks = True
    #: After how many rounds a weight's part has the same shape again: so many leaves take turns.
    shapes_repeat = 1
    #: What becomes of an optimizer's moments of a part that moves: "reset" or "carry".
    optimizer_state = "reset"
    #: What `share` is, for the picture's title.
    share_means = "share of {rounds} rounds in which a weight trained"

    def __init__(self, reselect: str = "stage", picture: bool = False, interval: int | None = None) -> None:
        if reselect not in RESELECT:
            raise ValueError(f"reselect={reselect!r} is not known: use one of {RESELECT}.")
        if interval is not None and interval < 1:
            raise ValueError(f"interval={interval} must be a number of optimizer steps of at least 1.")
        self.reselect, self.picture, self.interval = reselect, picture, interval
        self.round = 0
        self.rounds_trained: dict[str, int] = {}  # weight -> rounds in which it trained
        self._stages_done = 0
        self._steps = 0  # optimizer steps of this round when the run was stopped
        self._epoch = 0  # of the trainer, for which this round was chosen
        self._began: int | None = None  # global_step at which this round began
        self._selected: set[str] = set()  # whole weights, and leaves of parts
        self._candidates: set[str] = set()
        self._before: dict[str, bool] = {}
        self._parts: dict[str, Part] = {}
        self._leaves: dict[str, PartLeaf] = {}
        self._weights: list[Weight] = []
        self._new_round = True
        self._strict = False  # whether the module's strict loading waits to be switched on again
        self._checked = False  # whether every leaf gets a gradient
        self._groups: OptimizerGroups | None = None
        self._trainer: L.Trainer | None = None
        self._module: L.LightningModule | None = None

    # -- what a technique says ------------------------------------------------------------------------------------

    @abstractmethod
    def candidates(self, weights: list[Weight]) -> set[str]:
        """Names of the weights that this technique decides about. Raise if the network lacks what it needs."""

    def select(self, weights: list[Weight], round: int) -> set[str]:
        """Names of the candidates that train whole in this round, a pure function of its arguments."""
        return set()

    def parts(self, weights: list[Weight], round: int) -> dict[str, Part]:
        """Which part of a candidate trains in this round, by the candidate's name; a pure function of its arguments.

        A weight's part may move from round to round but not change its shape, unless `shapes_repeat` says so.
        """
        return {}

    def arguments(self) -> dict[str, Any]:
        """What makes two of these callbacks different, JSON values; part of the key of their state."""
        return {"reselect": self.reselect}

    # -- state ----------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**self.arguments())

    def state_dict(self) -> dict[str, Any]:
        steps = self._steps
        if self._trainer is not None and self._began is not None:
            steps = self._trainer.global_step - self._began
        return {
            "round": self.round,
            "steps": steps,
            "epoch": self._epoch,
            "stages_done": self._stages_done,
            "selected": sorted(self._selected),
            "parts": {name: part.state() for name, part in self._parts.items()},
            "rounds_trained": self.rounds_trained,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._candidates:
            self._take(state_dict)  # outside of fit: nothing to compare with
            return
        parts = {name: Part.of_state(state) for name, state in state_dict["parts"].items()}
        same = set(state_dict["selected"]) == self._selected and parts == self._parts
        if not same or state_dict["round"] != self.round:
            raise ValueError(
                f"{type(self).__name__}: the checkpoint trains other weights in round {state_dict['round']} than this "
                f"run would in round {self.round}: it comes from another network or other arguments."
            )

    def _take(self, state: dict[str, Any]) -> None:
        self.round, self._stages_done, self._steps = state["round"], state["stages_done"], state["steps"]
        self.rounds_trained, self._epoch = dict(state["rounds_trained"]), state["epoch"]
        self._new_round = False

    # -- fit ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._refuse(trainer)
        self._release()  # of a fit that an exception ended
        self._epoch = 0
        states = resumed_callback_states(trainer)
        resumed = states.get(self.state_key)
        if resumed is not None:
            self._take(resumed)
        elif others := [key for key in states if key.startswith(f"{type(self).__qualname__}{{")]:
            raise ValueError(
                f"the checkpoint was written with {others[0]} and this run has {self.state_key}, which trains other "
                "weights: resume with the same arguments, or load the weights alone and begin a new fit."
            )
        elif self._stages_done and self.reselect == "stage" and self.interval is None:
            self.round, self._new_round = self.round + 1, True
        self._trainer, self._module = trainer, pl_module
        when_built(pl_module, self._begin)

    def _refuse(self, trainer: L.Trainer) -> None:
        from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

        own, strategy = type(self).__name__, type(trainer.strategy).__name__
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                f"{own} does not work with {strategy}(start_method=...) in spawned, forked or notebook processes: the "
                "callback in this process would not know what trained. Use strategy='ddp'."
            )
        if strategy in ("FSDPStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"{own} needs the parameters one by one and {strategy} flattens or hides them: use strategy='ddp' or "
                "ModelParallelStrategy (FSDP2)."
            )

    def _begin(self, pl_module: L.LightningModule) -> None:
        weights = self._weights = weights_by_role(pl_module, need_blocks=self.needs_blocks)
        candidates = self.candidates(weights)
        parameters = dict(pl_module.named_parameters())
        for name in sorted(candidates):
            quantised = type(parameters[name]).__name__ in ("Params4bit", "Int8Params")
            if quantised or not parameters[name].is_floating_point():
                raise ValueError(
                    f"{type(self).__name__}: {name} is stored in {parameters[name].dtype} (quantised) and cannot "
                    "train in place: load the network unquantised, or add weights with callbacks.PEFT."
                )
        self._own(pl_module, candidates)
        self._make_leaves(pl_module, weights)
        parameters = dict(pl_module.named_parameters())
        self._candidates = candidates | self._leaves.keys()
        self._before = {name: parameters[name].requires_grad for name in candidates}
        self._choose(pl_module)
        self._groups = OptimizerGroups.of(pl_module)
        self._groups.watch(self, self._candidates, lambda: self._selected, self._stepped)
        trainer = self._trainer
        if self._leaves and trainer is not None and type(trainer.strategy).__name__ == "ModelParallelStrategy":
            self._expect_no_leaves(trainer, pl_module)

    def _expect_no_leaves(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets a checkpoint of one file be loaded into sharded weights: there Lightning looks for every parameter."""
        found = resumed_weights(trainer)
        if not found or not pl_module.strict_loading:
            return
        missing = sorted(pl_module.state_dict().keys() - found)
        if missing:
            raise KeyError(f"the checkpoint lacks {missing[0]} ({len(missing)} weights in all): another network's.")
        self._strict, pl_module.strict_loading = True, False

    def _own(self, pl_module: L.LightningModule, candidates: set[str]) -> None:
        owners: dict[str, WeightSelection] = pl_module.__dict__.setdefault("_weight_owners", {})
        for owner in {id(owner): owner for owner in owners.values()}.values():
            if owner._trainer is not self._trainer:
                owner._release()  # a fit that an exception ended: nobody tore it down
        owners = pl_module.__dict__.setdefault("_weight_owners", {})
        taken = sorted(name for name in candidates if name in owners)
        if taken:
            raise ValueError(
                f"{type(self).__name__} and {type(owners[taken[0]]).__name__} would both choose whether {taken[0]} "
                f"trains ({len(taken)} weights in common): keep one of the two callbacks."
            )
        owners.update(dict.fromkeys(candidates, self))

    def _make_leaves(self, pl_module: L.LightningModule, weights: list[Weight]) -> None:
        uses: dict[int, int] = {}
        for _, parameter in pl_module.named_parameters(remove_duplicate=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        parameters, roles = dict(pl_module.named_parameters()), {w.name: w.role for w in weights}
        # In the same order whatever round a run begins in: checkpoints number parameters.
        first = self.round - self.round % self.shapes_repeat
        for round in range(first, first + self.shapes_repeat):
            for name, part in self.parts(weights, round).items():
                if uses[id(parameters[name])] > 1 or roles[name] == "head":
                    raise ValueError(
                        f"{type(self).__name__}: {name} is shared by several modules or makes the logits, which are "
                        "computed elsewhere: it can train whole or not at all, not in part."
                    )
                leaf = self._leaf(name, part)
                if leaf not in self._leaves:
                    path, _, own = name.rpartition(".")
                    self._leaves[leaf] = PartLeaf(pl_module.get_submodule(path), own, part)

    def _leaf(self, name: str, part: Part) -> str:
        """The leaf's name in the module, from its weight's."""
        path, dot, own = name.rpartition(".")
        return f"{path}{dot}{leaf_name(own, part)}"

    def _choose(self, pl_module: L.LightningModule) -> None:
        self._parts = self.parts(self._weights, self.round)
        self._selected = set(self.select(self._weights, self.round))
        for name, part in self._parts.items():
            self._leaves[self._leaf(name, part)].move(part)
            self._selected.add(self._leaf(name, part))
        if not self._selected:
            raise ValueError(
                f"{type(self).__name__} selects no weight in round {self.round}: nothing of it would train."
            )
        for name, parameter in pl_module.named_parameters():
            if name in self._candidates:
                parameter.requires_grad_(name in self._selected)
                if name not in self._selected:
                    parameter.grad = None

    def _stepped(self) -> None:
        """After an optimizer's step: what the leaves became, stands in the weights."""
        write_back(leaf for name, leaf in self._leaves.items() if name in self._selected)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reshard(pl_module)
        for leaf in self._leaves.values():
            leaf.pull()  # the weights have been restored or loaded since
        if self._strict:
            self._strict, pl_module.strict_loading = False, True
        self._began = trainer.global_step - self._steps
        self._count(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._move_with_the_epoch(trainer, pl_module)

    def _move_with_the_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.reselect == "epoch" and self.interval is None and trainer.current_epoch > self._epoch:
            self._epoch = trainer.current_epoch
            self.move(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Resumed from what was saved after an epoch's last batch, Lightning does not call on_train_epoch_start.
        self._move_with_the_epoch(trainer, pl_module)
        # Here and not after the step: whoever saved a checkpoint in between, the resumed run moves at the same place.
        if self.interval is None or self._began is None:
            return
        if trainer.global_step - self._began >= self.interval:
            self.move(trainer, pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._checked:
            return
        self._checked = True
        lost = [name for name, leaf in self._leaves.items() if name in self._selected and leaf.leaf.grad is None]
        if lost:
            rank_zero_warn(
                f"{type(self).__name__}: {len(lost)} of {len(self._parts)} parts got no gradient in the first backward "
                f"and do not train, first {lost[0]}: their modules were not called, or others read their weights."
            )

    def move(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Goes on to the next round: chooses again, edits the optimizers in place, and lets DDP see what trains."""
        before, parts = self._selected, self._parts
        self.round, self._new_round = self.round + 1, True
        self._steps, self._began = 0, trainer.global_step
        reshard(pl_module)  # what FSDP2 still holds gathered would not learn that it trains now
        self._choose(pl_module)
        assert self._groups is not None
        self._groups.apply(trainer.optimizers)
        if self.optimizer_state == "reset":
            moved = {self._leaf(name, part) for name, part in self._parts.items() if parts.get(name) != part}
            self._groups.reset(trainer.optimizers, moved & before)
        if self._selected != before and isinstance(trainer.strategy.model, nn.parallel.DistributedDataParallel):
            # DDP reduces what required a gradient when it wrapped; it would drift without a word (ARCHITECTURE, 3).
            trainer.strategy.model = trainer.strategy._setup_model(pl_module)
        self._count(trainer, pl_module)

    def _count(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._new_round:
            self._new_round = False
            for name in self._selected:
                self.rounds_trained[name] = self.rounds_trained.get(name, 0) + 1
        named = list(pl_module.named_parameters())
        trained = sum(p.numel() for _, p in named if p.requires_grad)
        total = sum(p.numel() for name, p in named if name not in self._leaves)
        if self.interval is None or self.round == 0:
            rank_zero_info(f"{type(self).__name__}: round {self.round} trains {trained:,} of {total:,} parameters")
        for logger in trainer.loggers:
            logger.log_metrics(
                {"trainable_parameters": trained, "trainable_fraction": trained / total}, step=trainer.global_step
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stages_done += 1
        if self._began is not None:
            self._steps = trainer.global_step - self._began
        if self.picture and trainer.is_global_zero:
            self.draw(trainer, pl_module)

    def share(self, weight: Weight) -> float:
        """What the picture shows of a weight: the share of rounds in which it trained."""
        return self.rounds_trained.get(weight.name, 0) / (self.round + 1)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """A map of block x role of each weight's `share`. Returns the PNG's path."""
        from lightning_peft.pictures import new_figure, write_picture

        weights = [w for w in self._weights if w.block is not None and not w.is_bias]
        roles = list(dict.fromkeys(w.role for w in weights))
        blocks = list(dict.fromkeys(w.block for w in weights))
        table: list[list[list[float]]] = [[[] for _ in roles] for _ in blocks]
        for w in weights:
            table[blocks.index(w.block)][roles.index(w.role)].append(self.share(w))
        figure, axes = new_figure(1 + 0.7 * len(roles), 1.5 + 0.25 * len(blocks))
        values = [[sum(cell) / len(cell) if cell else float("nan") for cell in row] for row in table]
        image = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks(range(len(roles)), roles, rotation=45, ha="right")
        axes.set_yticks(range(len(blocks)), [str(i) for i in range(len(blocks))])
        axes.set(ylabel="block", title=f"{type(self).__name__}: {self.share_means.format(rounds=self.round + 1)}")
        figure.colorbar(image)
        return write_picture(trainer, figure, type(self).__name__.lower(), None)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            forget(pl_module)
            self._release()

    def _release(self) -> None:
        """Takes back everything from the module."""
        pl_module, self._trainer, self._module, self._began = self._module, None, None, None
        if pl_module is None:
            return
        if self._groups is not None:
            self._groups.release(self)
        for leaf in self._leaves.values():
            leaf.detach()
        owners: dict[str, WeightSelection] = pl_module.__dict__.get("_weight_owners", {})
        for name in [name for name, owner in owners.items() if owner is self]:
            del owners[name]
        if not owners:
            pl_module.__dict__.pop("_weight_owners", None)
        for name, parameter in pl_module.named_parameters():
            if name in self._before:
                parameter.requires_grad_(self._before[name])
        self._groups, self._before, self._candidates, self._leaves = None, {}, set(), {}
