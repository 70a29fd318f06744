"""Image classification: a unit of the loss is an image, and objectives may act on what the head reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.models.fine_tuning_module import StepTerms
from lightning_peft.models.output_head import replaced_forward
from lightning_peft.models.pretrained import load_pretrained
from lightning_peft.models.sequence_classifier import IGNORED, UnitModule
from lightning_peft.objectives.objective import HeadTerm, TrunkState

if TYPE_CHECKING:
    from lightning_peft.objectives.objective import Batch


@dataclass
class ImageOutputs:
    """What a classifier made of a batch.

    Args:
        logits: [batch, classes].
        features: What the head read, before any objective changed it, [batch, width].
        further: Each further term of an objective with the head's logits of its rows [n, classes].
    """

    logits: Tensor
    features: Tensor
    further: list[tuple[HeadTerm, Tensor]] = field(default_factory=list)


def classification_head(network: Any) -> nn.Module:
    """The layer that makes the logits: the last one with as many outputs as there are classes, in its PEFT wrapping.

    Raises:
        ValueError: There is none, or the network's config does not say how many classes there are.
    """
    classes = getattr(getattr(network, "config", None), "num_labels", None)
    found: tuple[str, nn.Module] | None = None
    for name, module in network.named_modules():
        inside = found is not None and name.startswith(f"{found[0]}.")
        if not inside and classes is not None and getattr(module, "out_features", None) == classes:
            found = name, module
    if found is None:
        raise ValueError(
            f"{type(network).__name__} has no linear layer with {classes} outputs (config.num_labels): an image "
            "classifier needs one, such as those that AutoModelForImageClassification loads."
        )
    return found[1]


class ImageClassifier(UnitModule):
    """Any image classifier of transformers, fine-tuned on labelled images.

    Batches hold `pixel_values` [batch, channels, height, width] and `labels` [batch] (class indices; -100 is not
    learnt). Where a network loaded by name has another number of classes, its head is made anew.

    Args:
        model: Hub name, folder, or a network that is already built.
        num_labels: Number of classes of a network loaded by name; by default as many as it has.
        head_learning_rate: Peak learning rate of the classification head; by default that of the rest.
        freeze_batch_norm: Batch norms keep their scale, shift and running statistics, and normalise by the latter in
            training too.
        **kwargs: The arguments of `FineTuningModule`.

    Raises:
        ValueError: `num_labels` is below 2, `head_learning_rate` below 0, or the network has no linear head.
    """

    auto_class = "AutoModelForImageClassification"

    def __init__(
        self,
        model: str | nn.Module,
        num_labels: int | None = None,
        head_learning_rate: float | None = None,
        freeze_batch_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        if num_labels is not None and num_labels < 2:
            raise ValueError(f"num_labels={num_labels}: a classifier needs at least 2 classes.")
        if head_learning_rate is not None and not head_learning_rate >= 0:
            raise ValueError(f"head_learning_rate={head_learning_rate} must be at least 0.")
        self._num_labels, self.head_learning_rate, self.freeze_batch_norm = num_labels, head_learning_rate, False
        super().__init__(model=model, **kwargs)
        classification_head(self.model)
        if freeze_batch_norm:
            self.freeze_batch_norms()

    def load_network(self, model: str, dtype: str, attn: str | None, revision: str | None, trust: bool) -> nn.Module:
        options = {} if self._num_labels is None else {"num_labels": self._num_labels, "ignore_mismatched_sizes": True}
        return load_pretrained(self.auto_class, model, dtype, attn, revision, trust, **options)

    @property
    def num_classes(self) -> int:
        """Classes that the network tells apart."""
        return self.model.config.num_labels  # type: ignore[return-value]

    def freeze_batch_norms(self) -> None:
        """Batch norms stay as they are from here on, in whatever mode the rest is."""
        self.freeze_batch_norm = True
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ImageClassifier:
        super().train(mode)
        if self.freeze_batch_norm:
            self.freeze_batch_norms()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What trains: matrices with `weight_decay`, the rest without; the head apart if it has its own rate."""
        groups = super().parameter_groups()
        if self.head_learning_rate is None:
            return groups
        head = {id(p) for p in classification_head(self.model).parameters()}
        apart = []
        for group in groups:
            for own, rate in ((False, self.learning_rate), (True, self.head_learning_rate)):
                chosen = [p for p in group["params"] if (id(p) in head) == own]
                apart.append({**group, "params": chosen, "lr": rate})
        return [group for group in apart if group["params"]]

    # -- the step -------------------------------------------------------------------------------------------------

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """What the network is called with. Override for a network that takes more than pixels."""
        return {"pixel_values": batch["pixel_values"]}

    def features(self, batch: Batch, network: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """What the head reads [batch, width] and the logits [batch, classes], by the network alone.

        Args:
            batch: The batch.
            network: Another network than the module's own, such as a frozen reference.
        """
        network = self.model if network is None else network
        seen: list[Tensor] = []

        def look(features: Tensor) -> Tensor:
            seen.append(features)
            return original(features)

        with replaced_forward(classification_head(network), look) as original:
            logits = network(**self.model_inputs(batch)).logits
        return seen[0], logits

    def logits_and_labels(self, batch: Batch) -> tuple[Tensor, Tensor, ImageOutputs]:
        seen: dict[str, Any] = {}

        def read(features: Tensor) -> Tensor:
            rows = features
            if self.training:
                for objective in self.objectives:
                    rows = objective.before_head(self, batch, rows)
            trunk = TrunkState(features, features.new_empty(0), (), {}, original)
            seen["features"] = features
            seen["further"] = [(term, original(term.hidden)) for term in self.head_terms(batch, trunk)]
            return original(rows)

        # Inside the head's own forward its weight is whole under FSDP2 (FINDINGS, 7).
        with replaced_forward(classification_head(self.model), read) as original:
            logits = self.model(**self.model_inputs(batch)).logits
        outputs = ImageOutputs(logits, **seen)
        return logits, batch["labels"], outputs

    def count_units(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def terms(self, batch: Batch, counts: dict[str, Tensor]) -> StepTerms:
        terms = super().terms(batch, counts)
        for term, logits in terms.outputs.further:
            nll = F.cross_entropy(logits.float(), term.labels, ignore_index=IGNORED, reduction="none")
            terms.loss = terms.loss + term.coefficient / counts[term.name].clamp(min=1) * nll.sum()
            terms.sums[term.name] = nll.detach().sum()
            terms.counts[term.name] = int((term.labels != IGNORED).sum())
        return terms

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Class probabilities, [batch, classes]."""
        return self.features(batch)[1].float().softmax(-1)
