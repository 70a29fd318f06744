"""The output head as what it really computes: its effective matrix where it is one, the module itself otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.kernels import CrossEntropyOutput, linear_cross_entropy

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LogitTransform:
    """What a network does to its head's output: logits = softcap * tanh(scale * z / softcap).

    Args:
        softcap: Gemma's `final_logit_softcapping`, or `None`.
        scale: Cohere's `logit_scale`, or one over Granite's `logits_scaling`.
    """

    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Reads a transformers config."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = getattr(text, "logit_scale", None) or 1.0
        divisor = getattr(text, "logits_scaling", None) or 1.0
        return cls(getattr(text, "final_logit_softcapping", None) or None, float(scale) / float(divisor))

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def check(self, probed: Tensor) -> None:
        """Raises if the network made something else of a head output of 1 than this transform would."""
        expected = self.scale if self.softcap is None else self.softcap * math.tanh(self.scale / self.softcap)
        if not torch.allclose(probed.float(), torch.full_like(probed, expected, dtype=torch.float32), rtol=2e-2):
            raise ValueError(
                f"the network changes its output head's result in a way that its config does not name (1 became "
                f"{probed.flatten()[0].item():.4g}, expected {expected:.4g}): known are final_logit_softcapping, "
                "logit_scale and logits_scaling. Override `CausalLM.logit_transform` for this network."
            )


def head_of(network: Any) -> nn.Module:
    """The module that makes logits, as the network calls it (through PEFT wrapping)."""
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"{type(network).__name__} has no output head (get_output_embeddings() gives None): a causal language "
            "model needs one, such as those that AutoModelForCausalLM loads."
        )
    return head


def matrix_of(head: Any) -> tuple[Tensor, Tensor | None] | None:
    """The head's weight [V, H] and bias [V] if it is a plain linear; `None` if it is more (LoRA, quantised, ...)."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        saved: dict[Any, Any] = {} if head.disable_adapters else dict(head.modules_to_save.items())
        head = saved.get(head.active_adapter, head.original_module)
    # fully_shard makes a subclass of the module's own class on the fly; nothing else may stand for Linear.
    plain = type(head) is nn.Linear or (isinstance(head, nn.Linear) and type(head).__name__ == "FSDPLinear")
    if not plain or "parametrizations" in head._modules or head._forward_hooks:
        return None
    return head.weight, head.bias


@contextmanager
def replaced_forward(module: nn.Module, forward: Forward) -> Iterator[Forward]:
    """Runs `module` with another forward for a while, its hooks (FSDP2's, PEFT's) as ever; yields the one it had."""
    own = module.__dict__.get("forward")
    original = module.forward
    module.forward = forward
    try:
        yield original
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def nll_through_head(
    forward: Forward, hidden: Tensor, labels: Tensor, transform: LogitTransform, chunk_rows: int = 1024
) -> CrossEntropyOutput:
    """Cross-entropy through the head's own forward, for heads that are more than a matrix.

    Chunks of rows are recomputed in the backward, so that no more than `chunk_rows` rows of logits stand at once.

    Args:
        forward: The head's own forward.
        hidden: Rows [N, H].
        labels: Targets [N], none ignored.
        transform: What the network does to the head's output.
        chunk_rows: Rows of logits held at once.
    """

    def chunk(rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = transform(forward(rows)).float()
        log_p = logits.log_softmax(-1)
        return (
            -log_p.gather(1, targets[:, None]).squeeze(1),
            logits.logsumexp(-1),
            -(log_p.exp() * log_p).sum(-1),
            logits.argmax(-1) == targets,
        )

    parts = [
        checkpoint(chunk, rows, targets, use_reentrant=False)
        for rows, targets in zip(hidden.split(chunk_rows), labels.split(chunk_rows))
    ]
    return CrossEntropyOutput(*(torch.cat(column) for column in zip(*parts)))


def head_nll(
    head: nn.Module,
    forward: Forward,
    hidden: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    statistics: frozenset[str] = frozenset(),
) -> CrossEntropyOutput:
    """nll of rows and the asked statistics, by the kernel if the head is a matrix; call inside its forward."""
    matrix = matrix_of(head)
    if matrix is None:
        return nll_through_head(forward, hidden, labels, transform)
    weight, bias = matrix
    made = linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        softcap=transform.softcap,
        logit_scale=transform.scale,
        statistics=statistics,
    )
    assert isinstance(made, CrossEntropyOutput)  # statistics were given
    return made
