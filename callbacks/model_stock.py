"""Model Stock during training: models that take turns and are merged with their base each round (arXiv 2403.19522)."""

from __future__ import annotations

import weakref
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_peft.host_copies import (
    OptimizerState,
    blank_optimizer_state,
    gathered,
    give_optimizer_state,
    local,
    map_tensors,
    part_of,
    reshard,
    sum_over_shards,
    take_optimizer_state,
    to_host,
)
from lightning_peft.merging.model_stock import check_options, inner_products, interpolate, interpolation_ratio
from lightning_peft.when_built import is_sharded

Weights = dict[str, Tensor]


class ModelStock(L.Callback):
    """Trains N models in turn from the same weights and replaces all by their merge at the end of each round.

    A round: from the weights at its start, each of the N = `partners` + 1 models trains for a `period`; then all become
    `theta0 + t (average - theta0)`, tensor by tensor, with t by the angle between their deltas from theta0, which stays
    the pretrained weights for ever. The models differ by the data of their turns: with "epoch" each sees all of it in
    an order of its own, with a number of steps each sees the next stretch of the same stream. So `max_epochs` counts
    turns: give N times the epochs that each model is to train. The learning-rate schedule runs over all turns.

    What trains is merged, each parameter as it is (of a LoRA adapter A and B on their own); frozen weights stay theta0
    and are not kept; buffers (statistics of batch norm) run on through the turns. The other models wait in host memory
    with theta0 and their optimizer states, and are in the checkpoint. The network always is a model that others can
    load: at the borders of turns, so in validation and checkpoints at the end of an epoch, it is the last merge (theta0
    in the first round); in between it is the model whose turn it is. A run that ends within a round merges the models
    that have trained in it, if there are two. Works under DDP and FSDP2, where each rank merges its shards.

    Args:
        period: Length of a turn: "epoch", or a number of optimizer steps as `trainer.global_step` counts them.
        partners: Models beside the first one, N - 1.
        optimizer_state: "keep" gives each model its own moments over all rounds, "reset" starts each turn without any.
        filter_wise: One angle for each slice along the last dimension instead of one for each tensor.
        pairwise: For more than two models the mean of the "cos" or of the "angle" of all pairs.
        clamp: Keep t in [0, 1].

    Raises:
        ValueError: An argument is out of range, the run is too short for one round, the checkpoint to resume from has
            no state of this callback, or another callback or strategy does not go with it.
    """

    def __init__(
        self,
        period: str | int = "epoch",
        partners: int = 1,
        optimizer_state: str = "keep",
        filter_wise: bool = False,
        pairwise: str = "cos",
        clamp: bool = False,
    ) -> None:
        if period != "epoch" and (not isinstance(period, int) or isinstance(period, bool) or period < 1):
            raise ValueError(f"period={period!r} must be 'epoch' or a number of optimizer steps of at least 1.")
        if partners < 1:
            raise ValueError(
                f"partners={partners} must be at least 1: there is no angle between fewer than two models."
            )
        if optimizer_state not in ("keep", "reset"):
            raise ValueError(f"optimizer_state={optimizer_state!r} is not known: use 'keep' or 'reset'.")
        check_options(partners + 1, pairwise)
        self.period, self.partners, self.optimizer_state = period, partners, optimizer_state
        self.filter_wise, self.pairwise, self.clamp = filter_wise, pairwise, clamp
        self.round = 0
        self.turn = 0  # whose it is: 0 ... partners
        self._began = 0  # global_step at the turn's start
        self._theta0: Weights = {}
        self._start: Weights = {}  # the weights that every turn of the round starts from; not needed in its last turn
        self._trained: list[Weights] = []  # of the models that have had their turn in this round
        self._optimizers: dict[int, list[OptimizerState]] = {}  # of the models whose turn it is not
        self._loaded_whole = False  # what a checkpoint brought are whole tensors, whatever this run shards
        self._resumed = False
        self._module: weakref.ref[L.LightningModule] | None = None

    # -- fit ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._resumed = False
        strategy = type(trainer.strategy).__name__
        if strategy in ("FSDPStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"ModelStock needs the parameters one by one and {strategy} flattens or hides them: use "
                "strategy='ddp' or ModelParallelStrategy (FSDP2)."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            averages = {"WeightAveraging", "StochasticWeightAveraging"} & {c.__name__ for c in type(other).__mro__}
            if averages or (isinstance(other, ModelStock) and other is not self):
                raise ValueError(
                    f"ModelStock and {type(other).__name__} in one run would average models that take turns: keep one."
                )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = trainer.state.fn == "fit" and self.state_key in checkpoint.get("callbacks", {})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reshard(pl_module)
        self._shard_what_was_loaded(pl_module)
        if not self._resumed:
            if trainer.ckpt_path is not None:
                raise ValueError(
                    f"the checkpoint {trainer.ckpt_path} has no state of ModelStock, so the pretrained weights are not "
                    "known: load it into the module and fit without ckpt_path (its weights become the base), or resume "
                    "without ModelStock."
                )
            if self._module is None or self._module() is not pl_module:
                self.round, self._theta0 = 0, {}
            self.turn, self._trained, self._optimizers = 0, [], {}
            self._began = trainer.global_step
            self._start = {n: to_host(p) for n, p in pl_module.named_parameters() if p.requires_grad}
            for name, weight in self._start.items():
                self._theta0.setdefault(name, weight)
        self._module = weakref.ref(pl_module)
        if not any(p.requires_grad for p in pl_module.parameters()):
            raise ValueError("no parameter trains, so there is nothing to merge.")
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_length(trainer, self.period, self.partners + 1, self.turn, self._began)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        # What another callback has unfrozen was the same in all models until now.
        late = [n for n, p in pl_module.named_parameters() if p.requires_grad and n not in self._theta0]
        if late:
            reshard(pl_module)
            for name, parameter in pl_module.named_parameters():
                if name in late:
                    for weights in (self._theta0, self._start, *self._trained):
                        weights[name] = to_host(parameter)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Here and not at the epoch's end: validation and checkpoints come in between and should see the merge.
        if self.period == "epoch":
            over = trainer.is_last_batch
        else:
            over = trainer.global_step - self._began >= int(self.period)
        if over:
            self._next_turn(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        lately = trainer.global_step - self._began
        if self.turn == 0 and not lately:
            return
        reshard(pl_module)
        if len(self._trained) + (lately > 0) >= 2:
            self._merge(trainer, pl_module, with_live=lately > 0)
        else:
            rank_zero_warn(
                "The run ended before two models of ModelStock's round had trained: the network is the last merge "
                f"({'the pretrained weights' if self.round == 0 else f'of round {self.round}'})."
            )
            self._load(pl_module, self._start)
            self._trained = []
        self._hand_over(trainer, pl_module, 0)

    # -- turns ----------------------------------------------------------------------------------------------------

    def _next_turn(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reshard(pl_module)
        following = (self.turn + 1) % (self.partners + 1)
        if following:
            self._trained.append(self._host(pl_module))
            self._load(pl_module, self._start)
            if following == self.partners:
                self._start = {}
        else:
            self._merge(trainer, pl_module)
        self._hand_over(trainer, pl_module, following)

    def _hand_over(self, trainer: L.Trainer, pl_module: L.LightningModule, following: int) -> None:
        """The optimizers' state goes from the model whose turn it was to the one whose turn it is."""
        parameters = dict(pl_module.named_parameters())
        taken = take_optimizer_state(trainer.optimizers, {id(p): n for n, p in parameters.items()})
        if self.optimizer_state == "keep":
            self._optimizers[self.turn] = taken
        state = self._optimizers.pop(following, None)
        if state is None:
            # A distributed checkpoint makes up what an optimizer has not got yet, by a step of its own.
            state = blank_optimizer_state(taken) if is_sharded(pl_module) else []
        give_optimizer_state(trainer.optimizers, parameters, state)
        self.turn, self._began = following, trainer.global_step

    @torch.no_grad()
    def _merge(self, trainer: L.Trainer, pl_module: L.LightningModule, with_live: bool = True) -> None:
        ratios = []
        for name, parameter in pl_module.named_parameters():
            if name not in self._theta0:
                continue
            part = local(parameter.detach())
            device = "cpu" if part.device.type == "mps" else part.device  # sums are in fp64, which MPS has not
            theta0 = self._theta0[name].to(device)
            thetas = [weights[name].to(device) for weights in self._trained] + [part.to(device)] * with_live
            ratio = self._ratio(name, parameter, theta0, thetas)
            part.copy_(interpolate(theta0, thetas, ratio))
            ratios.append(ratio.mean().nan_to_num())  # no rows of it lie here
        merged, self._trained, self._start = len(self._trained) + with_live, [], self._host(pl_module)
        self.round += 1
        mean = float(torch.stack(ratios).mean())
        rank_zero_info(f"ModelStock: merged {merged} models in round {self.round}, t = {mean:.3f}")
        for logger in trainer.loggers:
            logger.log_metrics({"model_stock_ratio": mean, "model_stock_round": self.round}, step=trainer.global_step)

    def _ratio(self, name: str, parameter: Tensor, theta0: Tensor, thetas: list[Tensor]) -> Tensor:
        by_row = self.filter_wise and parameter.ndim > 1  # a 1-D tensor is one row
        if by_row and any(p.is_shard(parameter.ndim - 1) for p in getattr(parameter, "placements", ())):
            raise ValueError(f"ModelStock(filter_wise=True): the rows of {name} are sharded; use filter_wise=False.")
        dots = inner_products(theta0, thetas, by_row)
        dots = dots if by_row else sum_over_shards(dots, parameter)
        return interpolation_ratio(dots, self.pairwise, self.clamp)

    def _host(self, pl_module: L.LightningModule) -> Weights:
        return {name: to_host(p) for name, p in pl_module.named_parameters() if name in self._theta0}

    @torch.no_grad()
    def _load(self, pl_module: L.LightningModule, weights: Weights) -> None:
        for name, parameter in pl_module.named_parameters():
            if name in weights:
                local(parameter.detach()).copy_(weights[name])

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All models but the one in the network; whole tensors, so a collective call where parameters are sharded."""
        state = {
            "round": self.round,
            "turn": self.turn,
            "began": self._began,
            "models": self.partners + 1,
            "theta0": self._theta0,
            "start": self._start,
            "trained": self._trained,
            "optimizers": self._optimizers,
        }
        module = self._module() if self._module is not None else None
        if self._loaded_whole or module is None or not is_sharded(module):
            return state
        return map_tensors(gathered, state, dict(module.named_parameters()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["models"] != self.partners + 1:
            raise ValueError(
                f"the checkpoint is of ModelStock with partners={state_dict['models'] - 1}, this run has "
                f"partners={self.partners}: give the same."
            )
        self.round, self.turn, self._began = state_dict["round"], state_dict["turn"], state_dict["began"]
        self._theta0, self._start = dict(state_dict["theta0"]), dict(state_dict["start"])
        self._trained = [dict(weights) for weights in state_dict["trained"]]
        self._optimizers = dict(state_dict["optimizers"])
        self._loaded_whole = True

    def _shard_what_was_loaded(self, pl_module: L.LightningModule) -> None:
        if not self._loaded_whole:
            return
        self._loaded_whole = False
        parameters = dict(pl_module.named_parameters())
        strange = [n for n, w in self._theta0.items() if n not in parameters or parameters[n].shape != w.shape]
        if strange:
            raise ValueError(f"ModelStock's checkpoint is of another network: {strange[:5]} ({len(strange)} in all).")
        state = [self._theta0, self._start, self._trained, self._optimizers]
        self._theta0, self._start, self._trained, self._optimizers = map_tensors(part_of, state, parameters)


def check_length(trainer: L.Trainer, period: str | int, models: int, turn: int, began: int) -> None:
    """Raises if the run ends before a round does; warns if its last round is not a whole one."""
    if period == "epoch" and trainer.max_epochs is not None and trainer.max_epochs > 0:
        left, what = trainer.max_epochs - trainer.current_epoch, "epochs"
        length, needed = models, models - turn
    elif isinstance(period, int) and trainer.max_steps > 0:
        left, what = trainer.max_steps - trainer.global_step, "steps"
        length, needed = models * period, (models - turn) * period - (trainer.global_step - began)
    else:
        return
    if 0 < left < needed:
        raise ValueError(
            f"ModelStock(period={period!r}, partners={models - 1}) merges after {needed} more {what} and the run has "
            f"{left} left, so nothing would be merged: train longer, or shorten the period."
        )
    if left > needed and (odd := (left - needed) % length):
        rank_zero_warn(f"ModelStock: the last {odd} {what} of this run are no whole round of {length}.")
