"""DSEE in stages (arXiv 2111.00160): train a low-rank and a sparse update, prune the base by it, train on."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_peft.adapters.dsee import POSITIONS, PRUNE, DSEEConfig, draw_positions, dsee_layers, set_positions
from lightning_peft.adapters.dsee_pruning import (
    SCORES,
    check_heads,
    is_pruned,
    prune_entries,
    prune_heads,
    sparsities,
)
from lightning_peft.adapters.injection import network_name
from lightning_peft.callbacks.peft import PEFT
from lightning_peft.checkpoint import resumed_callback_state
from lightning_peft.host_copies import reshard
from lightning_peft.optimizer_groups import OptimizerGroups

UNITS = ("epoch", "step")
#: Where DDP looks for the names of buffers that it is not to send from rank 0 before every forward.
IGNORED = "_ddp_params_and_buffers_to_ignore"


class DSEE(PEFT):
    """Trains y = (W * S1) x + alpha/r (U V + S2) x on any LightningModule, in the paper's three stages.

    1. U, V and the N entries of S2 train, S1 keeps everything.
    2. After `prune_after`, before the next step, S1 is made. "unstructured" drops the entries of lowest score, by one
       threshold for the adapted matrices and one for all other linear layers (heads and embeddings stay whole);
       "structured" drops the lowest heads of every attention, by its updates.
    3. Training goes on under S1, from a fresh optimizer state as in the paper's second run. Its learning-rate schedule
       is a new one too; here the module's own goes on.

    W keeps its values: S1 is a buffer (one bit an entry) in checkpoints and in saved adapters, and which stage a run is
    in is read from it. Dropped heads are masked while training, so that optimizers, DDP and FSDP2 keep their tensors;
    `lightning_peft.adapters.dsee_pruning.remove_heads` cuts them out of the trained network for real.

    The positions of S2 are chosen once, on rank 0, and are in the checkpoint. GreBsmo takes seconds for a matrix.

    The paper trains BERT-base with a learning rate of 2e-4 to 6e-4 for 5 epochs, then 5 to 10 more.

    Args:
        r: Rank of U V.
        alpha: The update is scaled by alpha / r.
        num_sparse: N, trainable entries of S2 in each matrix (the authors' scripts: 16).
        positions: Where they are: "grebsmo", "random" or "magnitude".
        prune: "unstructured", "structured" or "none" (one stage).
        prune_after: Stage 1 ends after so many epochs or optimizer steps.
        prune_unit: "epoch" or "step".
        sparsity: Share of the adapted matrices' entries that "unstructured" drops.
        sparsity_others: Share of the other linear layers' entries that it drops.
        heads: How many heads of every attention "structured" drops; where queries share keys and values, how many
            key-value heads, with their queries (the paper: 3 of 12).
        score: "WABS", by the changed weight, or "ABS", by the change alone (the authors' scripts).
        seed: Seed of positions.
        target_modules: Names of linear layers, or "all-linear"; by default PEFT's choice for the architecture (queries
            and values, as in the paper).
        quantization_config: See `callbacks.PEFT`. Entries of a quantised base cannot be pruned; heads can be masked.
        modules_to_save: Names of modules that train whole, besides the task's own; they are not pruned.
        autocast_adapter_dtype: Hold the adapter in fp32 where the network is in half precision.
        adapter_name: Name of the adapter; two of these callbacks need two names.
        network: Name of the network inside the module, needed only where it holds more than one.

    Raises:
        ValueError: An argument is out of range, a target is no linear layer, or the base cannot be pruned in this way.
    """

    def __init__(
        self,
        r: int = 16,
        alpha: int = 32,
        num_sparse: int = 64,
        positions: str = "grebsmo",
        prune: str = "unstructured",
        prune_after: int = 5,
        prune_unit: str = "epoch",
        sparsity: float = 0.2,
        sparsity_others: float = 0.2,
        heads: int = 3,
        score: str = "WABS",
        seed: int = 0,
        target_modules: list[str] | str | None = None,
        quantization_config: dict[str, Any] | None = None,
        modules_to_save: list[str] | None = None,
        autocast_adapter_dtype: bool = True,
        adapter_name: str = "default",
        network: str | None = None,
    ) -> None:
        for name, value, known in (
            ("positions", positions, POSITIONS[:-1]),
            ("prune", prune, PRUNE),
            ("prune_unit", prune_unit, UNITS),
            ("score", score, SCORES),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known: use one of {known}.")
        if prune_after < 1:
            raise ValueError(f"prune_after={prune_after}: the updates have to train at least one {prune_unit}.")
        if not (0 <= sparsity < 1 and 0 <= sparsity_others < 1) or (
            prune == "unstructured" and not sparsity + sparsity_others
        ):
            raise ValueError(
                f"sparsity={sparsity} and sparsity_others={sparsity_others} are shares in [0, 1) and not both 0: use "
                "prune='none' to prune nothing."
            )
        if prune == "unstructured" and quantization_config is not None:
            raise ValueError(
                "prune='unstructured' cannot drop entries of weights in 4 or 8 bits: leave quantization_config out, or "
                "use prune='structured' (heads) or 'none'."
            )
        config = DSEEConfig(
            r=r,
            alpha=alpha,
            num_sparse=num_sparse,
            positions="stored",  # chosen by `attach`, on one rank and not again where a checkpoint has them
            prune=prune,
            target_modules=target_modules,
        )
        super().__init__(
            config, None, quantization_config, modules_to_save, autocast_adapter_dtype, adapter_name, network
        )
        self.positions, self.seed = positions, seed
        self.prune, self.prune_after, self.prune_unit = prune, prune_after, prune_unit
        self.sparsity, self.sparsity_others, self.heads, self.score = sparsity, sparsity_others, heads, score
        self._waits = False  # whether stage 2 is still to come
        self._resumes = False
        self._groups: OptimizerGroups | None = None

    # -- insertion ------------------------------------------------------------------------------------------------

    def attach(self, module: L.LightningModule) -> nn.Module:
        network = super().attach(module)
        if self.prune == "structured":
            check_heads(network, self.adapter_name, self.heads)
        layers = dsee_layers(network, self.adapter_name).values()
        fresh = any(x.dsee_positions.blank.get(self.adapter_name, False) for x in layers)
        if fresh and not self._resumes:
            self._draw(network)
        if self._trainer is not None:  # one bit of every entry of the base, and the same on every rank
            setattr(module, IGNORED, sorted({*getattr(module, IGNORED, ()), *self._buffers(module)}))
        return network

    def _buffers(self, module: nn.Module) -> set[str]:
        """Names of the adapter's positions and masks in the module."""
        names = (name for name, _ in module.named_buffers())
        return {name for name in names if ".dsee_" in name and name.endswith(f".{self.adapter_name}")}

    def _draw(self, network: nn.Module) -> None:
        trainer, drawn = self._trainer, None
        if trainer is None or trainer.is_global_zero:
            drawn = draw_positions(network, self.adapter_name, self.positions, self.seed)
        if trainer is not None and trainer.world_size > 1:
            drawn = trainer.strategy.broadcast(drawn)
        assert drawn is not None
        set_positions(network, self.adapter_name, drawn)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._resumes = resumed_callback_state(trainer, self.state_key) is not None
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._groups = OptimizerGroups.of(pl_module)
            self._groups.watch(self, set(), set)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()
        others = sorted({*getattr(pl_module, IGNORED, ())} - self._buffers(pl_module))
        pl_module.__dict__.pop(IGNORED, None)
        if others:
            setattr(pl_module, IGNORED, others)
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._groups is not None:
            self._groups.release(self)
            self._groups = None

    # -- stages ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._waits = self.prune != "none" and not is_pruned(self._network(pl_module), self.adapter_name)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._prune_if_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Before a step and not after one: whoever saved a checkpoint in between, the resumed run prunes at this place.
        self._prune_if_due(trainer, pl_module)

    def _prune_if_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = trainer.current_epoch if self.prune_unit == "epoch" else trainer.global_step
        if not self._waits or now < self.prune_after:
            return
        self._waits = False
        reshard(pl_module)
        network = self._network(pl_module)
        if self.prune == "structured":
            prune_heads(network, self.adapter_name, self.heads, self.score)
            told = f"heads dropped in every attention: {self.heads}"
        else:
            prune_entries(network, self.adapter_name, self.sparsity, self.sparsity_others, self.score)
            shares = sparsities(network, self.adapter_name)
            told = f"shares of entries that are dropped are { ({g: round(x, 4) for g, x in shares.items()}) }"
            for logger in trainer.loggers:
                logger.log_metrics({f"sparsity_{group}": x for group, x in shares.items()}, step=trainer.global_step)
        assert self._groups is not None
        self._groups.reset(trainer.optimizers, [name for name, p in pl_module.named_parameters() if p.requires_grad])
        rank_zero_info(f"DSEE: after step {trainer.global_step} the base is pruned: {told}. The optimizer starts anew.")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._waits:
            rank_zero_warn(
                f"DSEE: training ended before {self.prune_unit} {self.prune_after}, so nothing has been pruned: train "
                "longer, or lower prune_after."
            )

    def _network(self, pl_module: L.LightningModule) -> nn.Module:
        return pl_module.get_submodule(network_name(pl_module, self.network))
