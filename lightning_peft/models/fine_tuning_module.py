"""The step: one place that says the loss, its denominators and what is logged, for every kind of network."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.checkpoint import restore_loader_positions
from lightning_peft.models.optimizers import OPTIMIZERS, imported, make_scheduler, parameter_groups
from lightning_peft.models.pretrained import load_pretrained, load_tokenizer
from lightning_peft.models.sharding import shard
from lightning_peft.models.token_metrics import log_term

if TYPE_CHECKING:
    from lightning_peft.kernels import Rows
    from lightning_peft.objectives.objective import Batch, HeadTerm, Objective, TrunkState


@dataclass
class StepTerms:
    """What one micro-batch adds to the step.

    Args:
        loss: The micro-batch's share of the step's loss, every term already over the step's own count; a scalar.
        sums: Detached numerator of each term on this micro-batch (without its coefficient).
        counts: Units of each term on this micro-batch.
        units: The detached rows the main loss was made of.
        weights: Weight of each unit [n], detached; `None` where nothing weighs them.
        per_row: For each term of the output matrix, the flat positions [n] that predict and their nll [n], detached.
        outputs: What the network returned.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    counts: dict[str, int]
    units: Rows
    weights: Tensor | None = None
    per_row: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    outputs: Any = field(default=None, repr=False)


class FineTuningModule(L.LightningModule):
    """A network, the objectives it learns by, and an optimizer.

    Denominators are those of the whole optimizer step, over its micro-batches and ranks, so that gradient accumulation
    and DDP give the gradient of the one large batch. To know them before the first backward the training loader has to
    look ahead: `lightning_peft.datamodules.LookAheadDataLoader`. With any other loader and accumulation the step falls
    back to the micro-batch's own counts and says so once.

    Args:
        model: Hub name, folder, `.gguf` file, `package:NAME/PATH`, or a network that is already built.
        tokenizer: Name or folder of the tokenizer, or one already loaded; by default that of `model`.
        objectives: What is added to the loss, in any order (see `lightning_peft.objectives`).
        learning_rate: Peak learning rate.
        optimizer: Class path, or one of "adamw", "adamw_8bit" (bitsandbytes), "adafactor", "sgd".
        optimizer_args: Further arguments of the optimizer, such as `{"betas": [0.9, 0.95]}`.
        weight_decay: Decay of matrices; biases and norms are not decayed.
        lr_scheduler: A name that `transformers.get_scheduler` knows ("cosine", "linear", "constant_with_warmup", ...),
            or the class path of a PyTorch scheduler.
        lr_scheduler_args: Further arguments of the scheduler.
        warmup_steps: Optimizer steps of linear warm-up; a number below 1 is a fraction of all steps.
        dtype: "float32", "bfloat16", "float16" or "auto" (as stored).
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; by default the network's own.
        gradient_checkpointing: Recompute activations in the backward instead of keeping them.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Allow networks whose code lives on the hub.

    Raises:
        ValueError: An argument is out of range; the message names it and what is accepted.
    """

    auto_class = "AutoModel"

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: str | Any | None = None,
        objectives: list[Objective] | None = None,
        learning_rate: float = 2e-5,
        optimizer: str = "adamw",
        optimizer_args: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_scheduler: str = "cosine",
        lr_scheduler_args: dict[str, Any] | None = None,
        warmup_steps: int | float = 0,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if not learning_rate >= 0:
            raise ValueError(f"learning_rate={learning_rate} must be at least 0.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} must be at least 0 (steps), or below 1 for a fraction.")
        # Only what JSON can hold: Lightning resumes with `weights_only=True`.
        ignored = ["objectives"]
        ignored += ["model"] if isinstance(model, nn.Module) else []
        ignored += [] if tokenizer is None or isinstance(tokenizer, str) else ["tokenizer"]
        self.save_hyperparameters(ignore=ignored)
        self.optimizer_path = OPTIMIZERS.get(optimizer, optimizer)
        imported(self.optimizer_path, "optimizer")
        self.learning_rate = learning_rate
        self.optimizer_args = optimizer_args or {}
        self.weight_decay = weight_decay
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_args = lr_scheduler_args or {}
        self.warmup_steps = warmup_steps
        self.revision, self.trust_remote_code = revision, trust_remote_code
        self._tokenizer = tokenizer if tokenizer is not None else (model if isinstance(model, str) else None)
        if isinstance(model, str):
            model = self.load_network(model, dtype, attn_implementation, revision, trust_remote_code)
        self.model = model
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.metrics = nn.ModuleDict()  # exact means over validation and test, made on first use
        self.objectives: list[Objective] = []
        for objective in objectives or []:
            self.add_objective(objective)
        self._step_counts: dict[str, Tensor] = {}
        self._steps_seen = 0
        #: Optimizer step at which the present schedule began: a stage with a fresh optimizer sets it (see `callbacks`).
        self.schedule_start = 0

    def load_network(self, model: str, dtype: str, attn: str | None, revision: str | None, trust: bool) -> nn.Module:
        """The network for a name; a subclass that needs further arguments overrides this."""
        return load_pretrained(self.auto_class, model, dtype, attn, revision, trust)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use; `None` for a ready-built network without one."""
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer, self.revision, self.trust_remote_code)
        return self._tokenizer

    # -- objectives -----------------------------------------------------------------------------------------------

    def add_objective(self, objective: Objective) -> None:
        """Appends an objective; call it before the optimizers are made (a constructor, or a callback's `setup`)."""
        from lightning_peft.objectives.objective import Objective

        for replacing, other in [(o, objective) for o in self.objectives] + [(objective, o) for o in self.objectives]:
            acts = [h for h in ("loss_weights", "head_terms") if getattr(type(other), h) is not getattr(Objective, h)]
            if type(replacing).replaces_main and acts:
                raise ValueError(
                    f"{type(replacing).__name__} trains by its own terms alone, so {type(other).__name__} has nothing "
                    "to act on beside it: use one of the two, or one after the other in two runs."
                )
        objective.attach(self)
        self.objectives.append(objective)

    def transform_batch(self, batch: Batch) -> Batch:
        """The batch to learn from, through every objective. The training loader calls it, before it counts."""
        for objective in self.objectives:
            batch = objective.transform_batch(self, batch)
        return batch

    def before_forward(self, batch: Batch) -> Batch:
        """The batch with what every objective adds to it before the step's forward; `terms` begins with it."""
        for objective in sorted(self.objectives, key=lambda objective: not objective.changes_inputs):
            batch = objective.before_forward(self, batch)
        return batch

    def loss_weights(self, batch: Batch, units: Rows) -> Tensor | None:
        """The product of all objectives' weights and of the batch's own `weight` column; [n], or `None` for 1.

        The column is [batch], or [batch, time] for packed rows.
        """
        weights: Tensor | None = None
        if "weight" in batch:
            own = batch["weight"].to(units.nll)
            weights = own.flatten()[units.index // max(batch["labels"].numel() // own.numel(), 1)]
        for objective in self.objectives:
            own = objective.loss_weights(self, batch, units)
            if own is not None:
                weights = own if weights is None else weights * own
        return weights

    @property
    def rowwise(self) -> bool:
        """Whether a unit's weight depends on that unit alone, for every objective."""
        return all(objective.rowwise for objective in self.objectives)

    def head_terms(self, batch: Batch, trunk: TrunkState) -> list[HeadTerm]:
        """Every objective's further losses through the output matrix."""
        return [term for objective in self.objectives for term in objective.head_terms(self, batch, trunk)]

    def auxiliary_losses(self, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        """Every objective's further numerators, by term."""
        terms: dict[str, Tensor] = {}
        for objective in self.objectives:
            terms.update(objective.auxiliary_losses(self, batch, outputs))
        return terms

    @property
    def schedule_step(self) -> int:
        """Optimizer steps since the present schedule began."""
        return self.global_step - self.schedule_start

    @property
    def schedule_steps(self) -> float:
        """Optimizer steps of the present schedule in all; infinite where Lightning cannot know."""
        steps = self.trainer.estimated_stepping_batches
        return steps - self.schedule_start if steps >= 0 else float("inf")  # Lightning says -1 for endless data

    # -- denominators ---------------------------------------------------------------------------------------------

    @abstractmethod
    def count_units(self, batch: Batch) -> int:
        """How many units (tokens, examples, pairs) the main loss of `batch` is a mean of."""

    def counts(self, batch: Batch) -> dict[str, int]:
        """Denominators of a transformed batch, by term; "loss" is the main one.

        Raises:
            ValueError: Two terms have one name.
        """
        counts = {"loss": self.count_units(batch)}
        for objective in self.objectives:
            own = objective.counts(self, batch)
            if taken := own.keys() & {*counts, "nll", "weight"}:
                raise ValueError(
                    f"{type(objective).__name__} adds a term named {min(taken)!r} and there is one already: two terms "
                    "need two names, and an objective may stand in the list once."
                )
            counts.update(own)
        return counts

    def bind_loader(self, loader: Any) -> None:
        """Lets a look-ahead loader count for this module. `InstructionData` calls it; `on_train_start` does as well."""
        if hasattr(loader, "bind"):
            loader.bind(self.transform_batch, self.counts, self._window)

    def on_fit_start(self) -> None:
        for objective in self.objectives:
            objective.on_fit_start(self)

    def on_train_start(self) -> None:
        restore_loader_positions(self.trainer)
        for loader in self.trainer.fit_loop._combined_loader.flattened:
            self.bind_loader(loader)
        self._steps_seen = self.global_step
        for objective in self.objectives:
            objective.on_train_start(self)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.global_step != self._steps_seen:
            self._steps_seen = self.global_step
            for objective in self.objectives:
                objective.on_step_end(self)

    def _window(self, batch_idx: int) -> int:
        """Micro-batches of the optimizer step that starts at `batch_idx`; an epoch's last window may be shorter."""
        left = self.trainer.num_training_batches - batch_idx
        return int(min(self.trainer.accumulate_grad_batches, max(left, 1)))

    def step_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Counts of the whole optimizer step by term, scalars; ranks add them up once a step."""
        own, unseen = batch.get("step_counts"), 1
        if own is None:
            own = self.counts(batch)
            if self._trainer is not None and self.trainer.accumulate_grad_batches > 1:
                unseen = self.trainer.accumulate_grad_batches  # the step's other micro-batches, taken to be as large
                rank_zero_warn(
                    "The training loader does not look ahead, so under accumulate_grad_batches="
                    f"{self.trainer.accumulate_grad_batches} each micro-batch is averaged by its own count. Use "
                    "lightning_peft.datamodules.LookAheadDataLoader for the exact mean of the step."
                )
        elif not batch["step_start"] and self._step_counts:
            return self._step_counts
        totals = torch.tensor(list(own.values()), device=self.device, dtype=torch.float32) * unseen
        if self._trainer is not None and self.trainer.world_size > 1:
            totals = self.trainer.strategy.reduce(totals, reduce_op="sum") * (self._replicas / self.trainer.world_size)
        self._step_counts = dict(zip(own, totals.unbind()))
        return self._step_counts

    @property
    def _replicas(self) -> int:
        """Processes that see different data (tensor-parallel ranks see the same)."""
        kwargs = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
        return kwargs["num_replicas"] if kwargs else 1

    # -- steps ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def terms(self, batch: Batch, counts: dict[str, Tensor]) -> StepTerms:
        """The micro-batch's terms, each over its entry in `counts`."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if "step_counts" not in batch:
            batch = self.transform_batch(batch)
        terms = self.terms(batch, self.step_counts(batch))
        for name, total in terms.sums.items():
            count = terms.counts[name]
            self.log(f"train_{name}", total / max(count, 1), batch_size=max(count, 1), prog_bar=name == "loss")
        # Lightning divides by the accumulation and DDP or FSDP by the replicas; the counts already cover both.
        return terms.loss * (self.trainer.accumulate_grad_batches * self._replicas)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, StepTerms]:
        return self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, StepTerms]:
        return self._evaluate(batch, "test", dataloader_idx)

    def _evaluate(self, batch: Batch, stage: str, dataloader_idx: int) -> dict[str, StepTerms]:
        batch = self.transform_batch(batch)
        counts = self.counts(batch)
        terms = self.terms(batch, {name: torch.tensor(float(n), device=self.device) for name, n in counts.items()})
        for name, total in terms.sums.items():
            log_term(self, f"{stage}_{name}", total, terms.counts[name], dataloader_idx)
        self.log_units(stage, terms.units, dataloader_idx)
        for objective in self.objectives:
            objective.on_evaluated(self, stage, terms, dataloader_idx)
        return {"terms": terms}  # for callbacks that draw or table what each token cost

    def log_units(self, stage: str, units: Rows, dataloader_idx: int) -> None:
        """Metrics of the evaluated units, from the same pass: `{stage}_accuracy`."""
        log_term(self, f"{stage}_accuracy", units.is_argmax.sum(), len(units.labels), dataloader_idx)

    # -- Lightning ------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shards the network under `ModelParallelStrategy` (FSDP2); a second call changes nothing."""
        if self._device_mesh is not None:
            shard(self, self._device_mesh)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What trains: matrices with `weight_decay`, biases and norms without."""
        return parameter_groups(self, self.weight_decay)

    def configure_optimizers(self) -> Any:
        optimizer_class = imported(self.optimizer_path, "optimizer")
        optimizer = optimizer_class(self.parameter_groups(), lr=self.learning_rate, **self.optimizer_args)
        scheduler = make_scheduler(
            self.lr_scheduler, optimizer, self.warmup_steps, self.schedule_steps, self.lr_scheduler_args
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        states = [objective.state_dict() for objective in self.objectives]
        if any(states):
            checkpoint["objectives"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for objective, state in zip(self.objectives, checkpoint.get("objectives", [])):
            objective.load_state_dict(state)
