"""Cross-entropy from hidden states and the output matrix, one loss a row, without ever holding the logits.

    z_ij = softcap * tanh(scale * (h_i . W_j + b_j) / softcap),   nll_i = logsumexp_j z_ij - z_{i, y_i}

Three backends compute the same numbers: Triton on CUDA, chunks of rows in plain torch elsewhere, and "reference",
which is slower and can be differentiated twice. In the spirit of cut-cross-entropy (Wijmans et al., arXiv 2411.09009),
with an upstream gradient per row: Liger's one-scalar form cannot weight tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft.kernels.chunked_cross_entropy import (
    Logits,
    RowLosses,
    WeightedRows,
    reference_statistics,
)

BACKENDS = ("auto", "triton", "torch", "reference")
STATISTICS = frozenset({"lse", "entropy", "is_argmax"})


class CrossEntropyOutput(NamedTuple):
    """Per row, [N]: nll, and what was asked for of logsumexp, entropy (both differentiable) and whether y is argmax."""

    nll: Tensor
    lse: Tensor | None
    entropy: Tensor | None
    is_argmax: Tensor | None


class Rows(NamedTuple):
    """What a weighting rule sees of rows [n], all detached; `index` is the row's number in the input."""

    nll: Tensor
    entropy: Tensor | None
    is_argmax: Tensor | None
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of this name


class WeightedOutput(NamedTuple):
    """Per row, [N], detached: what `weighted_linear_cross_entropy` summed; 0 on ignored rows."""

    nll: Tensor
    entropy: Tensor | None
    is_argmax: Tensor | None
    weights: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    chunk_rows: int | None = None,
    statistics: Collection[str] | None = None,
) -> Tensor | CrossEntropyOutput:
    """Negative log-likelihood of each row, [N] in fp32, differentiable for any upstream gradient per row.

    With a frozen head (weight and bias want no gradient) the gradient of a row's nll with respect to its own hidden
    state, (softmax_i - onehot_i) W, does not depend on the upstream: it is made in the forward while the logits are at
    hand, and the backward only scales it. With a trainable head the backward makes the logits again, chunk by chunk;
    `weighted_linear_cross_entropy` avoids that where the weights are known as a rule. Ignored rows cost nothing.

    Args:
        hidden: [N, H], floating.
        weight: [V, H], of the same dtype (under autocast any).
        labels: [N], int64, in [0, V) or `ignore_index`.
        bias: [V] or None.
        softcap: Gemma's cap of the logits.
        logit_scale: Factor on the logits, before the cap.
        ignore_index: Label of rows without a loss; they get 0.
        backend: "auto", "triton", "torch" or "reference" (differentiable twice).
        chunk_rows: How many rows' worth of logits are held at once; by default a few tens of megabytes.
        statistics: Any of "lse", "entropy", "is_argmax". Given (also empty), the result is a `CrossEntropyOutput`.

    Raises:
        ValueError: Shapes, dtypes, labels or arguments that do not fit; the message says which.
        RuntimeError: On a second derivative through any backend but "reference".
    """
    asked = _asked(statistics or ())
    logits = _checked(hidden, weight, labels, bias, softcap, logit_scale, ignore_index, backend, chunk_rows)
    kept = _kept(labels, ignore_index)
    rows, targets = (hidden, labels) if kept is None else (hidden[kept], labels[kept])
    if backend == "reference":
        parts = reference_statistics(rows, weight, bias, targets, logits)
    else:
        # Read before apply: `needs_input_grad` stays True under no_grad.
        parts = RowLosses.apply(rows, weight, bias, targets, logits, asked, torch.is_grad_enabled())
    named = _asked_for(CrossEntropyOutput._fields, parts, asked, kept, len(labels))
    output = CrossEntropyOutput(*named)  # type: ignore[arg-type]
    return output.nll if statistics is None else output


def weighted_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rule: Callable[[Rows], Tensor] | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    chunk_rows: int | None = None,
    statistics: Collection[str] = (),
) -> tuple[Tensor, WeightedOutput]:
    """sum_i scale_i rule(rows)_i nll_i with every gradient made in the forward: three products of the head, not four.

    Args:
        hidden: [N, H].
        weight: [V, H].
        labels: [N].
        rule: Weights [n] of `Rows` [n]; called chunk by chunk on detached rows, so a row's weight may depend on that
            row alone. Weights are constants. None is 1.
        bias: [V] or None.
        scale: Known coefficients [N], or None for 1.
        softcap: As in `linear_cross_entropy`.
        logit_scale: As there.
        ignore_index: As there.
        backend: As there; "reference" has no rule and is refused.
        chunk_rows: As there.
        statistics: Any of "entropy" and "is_argmax", for the rule and the result.

    Returns:
        The loss, a scalar in fp32, and the rows' detached `WeightedOutput`.

    Raises:
        ValueError: As `linear_cross_entropy`, or a rule that gives another shape.
    """
    if backend == "reference":
        raise ValueError("weighted_linear_cross_entropy has no 'reference' backend: weight linear_cross_entropy's nll.")
    asked = _asked(statistics, STATISTICS - {"lse"})
    logits = _checked(hidden, weight, labels, bias, softcap, logit_scale, ignore_index, backend, chunk_rows)
    kept = _kept(labels, ignore_index)
    index = torch.arange(len(labels), device=labels.device) if kept is None else kept
    rows, targets = (hidden, labels) if kept is None else (hidden[kept], labels[kept])
    factors = None if scale is None else (scale if kept is None else scale[kept]).detach().float()

    def weigh(nll: Tensor, entropy: Tensor | None, is_argmax: Tensor | None, start: int) -> Tensor:
        chunk = slice(start, start + len(nll))
        if rule is None:
            return torch.ones_like(nll)
        with torch.no_grad():
            given = rule(Rows(nll, entropy, is_argmax, targets[chunk], index[chunk]))
        if given.shape != nll.shape:
            raise ValueError(f"rule gave weights of shape {tuple(given.shape)} for rows of shape {tuple(nll.shape)}.")
        return given.detach().to(nll)

    parts: tuple[Tensor | None, ...]
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        loss, *parts = WeightedRows.apply(rows, weight, bias, targets, factors, logits, asked, weigh)
    else:
        # A frozen head's gradient is made in the forward anyhow, whatever the weights.
        wants_grad = torch.is_grad_enabled()
        nll, _, entropy, is_argmax = RowLosses.apply(rows, weight, bias, targets, logits, asked, wants_grad)
        known = None if entropy is None else entropy.detach()
        weights = weigh(nll.detach(), known, is_argmax, 0)
        loss = (nll * (weights if factors is None else weights * factors)).sum()
        parts = nll.detach(), known, is_argmax, weights
    return loss, WeightedOutput(*_asked_for(WeightedOutput._fields, parts, asked, kept, len(labels)))  # type: ignore[arg-type]


def _asked_for(
    names: Iterable[str], parts: Iterable[Tensor | None], asked: frozenset[str], kept: Tensor | None, n: int
) -> Iterator[Tensor | None]:
    """Of the kept rows' columns those that were asked for, each spread over all n rows with zeros elsewhere."""
    for name, part in zip(names, parts):
        if part is None or name in STATISTICS - asked:
            yield None
        else:
            yield part if kept is None else part.new_zeros(n).index_put((kept,), part)


def _asked(statistics: Collection[str], known: frozenset[str] = STATISTICS) -> frozenset[str]:
    asked = frozenset(statistics)
    if not asked <= known:
        raise ValueError(f"statistics={sorted(asked)}: known are {sorted(known)}.")
    return asked


def _kept(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Row numbers that have a label; None for all of them."""
    kept = (labels != ignore_index).nonzero().squeeze(1)
    return None if len(kept) == len(labels) else kept


def _checked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    backend: str,
    chunk_rows: int | None,
) -> Logits:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known: use one of {BACKENDS}.")
    check_head(hidden, weight, bias)
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, expected ({len(hidden)},): one for each row of hidden. Flatten "
            "batch and time first."
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: they must be int64.")
    _check_range(labels, len(weight), ignore_index)
    return logits_of(hidden, weight, softcap, logit_scale, backend, chunk_rows)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, suffix: str = "") -> None:
    """Raises where rows and a head do not fit; `suffix` ends the arguments' names."""
    from torch.distributed.tensor import DTensor

    if isinstance(weight, DTensor):
        raise ValueError(
            f"weight{suffix} is a sharded DTensor: call inside the output head's own forward, where FSDP2 has gathered "
            'it, or pass weight.full_tensor(grad_placements=[Partial("avg")]); a plain full_tensor() gives a wrong '
            "gradient."
        )
    if hidden.ndim != 2 or weight.ndim != 2:
        raise ValueError(
            f"hidden{suffix} must be [N, H] and weight{suffix} [V, H]; got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}. Flatten batch and time first."
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden{suffix} has width {hidden.shape[1]} and weight{suffix} {weight.shape[1]}: they must be equal."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias{suffix} has shape {tuple(bias.shape)}, expected ({len(weight)},).")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"hidden{suffix} is {hidden.dtype} and weight{suffix} {weight.dtype}: both must be floating. Dequantise a "
            "quantised head first."
        )
    if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden{suffix} is {hidden.dtype} and weight{suffix} {weight.dtype}: cast one of them, or use autocast."
        )


def logits_of(
    hidden: Tensor, weight: Tensor, softcap: float | None, logit_scale: float, backend: str, chunk_rows: int | None
) -> Logits:
    """How the logits of a checked hidden and weight are made: by which backend, in what dtype, how many at once."""
    kind = hidden.device.type
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1.")
    # Autocast leaves float64 alone, and so do we.
    autocast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
    # On a CPU a tile of 24 MB; elsewhere of 128 MB, so that the products fill the device. Chunks of whole rows add to
    # the head's whole gradient each time, so they are larger: a quarter of all, up to four such tiles.
    held = 6 * 2**20 if kind == "cpu" else 2**25
    rows = min(max(len(hidden) * len(weight) // 4, held), 4 * held) // len(weight)
    if chunk_rows is not None:
        held, rows = chunk_rows * len(weight), chunk_rows
    if backend == "triton" or (backend == "auto" and triton_serves(hidden, dtype)):
        try:
            from lightning_peft.kernels.triton_cross_entropy import TritonLogits
        except ImportError as missing:
            raise ImportError("backend='triton' needs the package triton: install it or use 'torch'.") from missing
        TritonLogits.check(hidden, dtype)
        return TritonLogits(softcap, logit_scale, dtype, held, max(1, rows))
    return Logits(softcap, logit_scale, dtype, held, max(1, rows))


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def triton_serves(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether "auto" is Triton: on a GPU with tensor cores for bf16 (Ampere on), where the package is installed."""
    if not hidden.is_cuda or dtype == torch.float64 or not _triton_installed():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(hidden.device) >= (8, 0)


def _check_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    fits = (labels == ignore_index) | ((labels >= 0) & (labels < vocabulary))
    if labels.is_cuda:
        torch._assert_async(fits.all(), f"a label is outside [0, {vocabulary})")  # no synchronisation in the hot path
    elif not bool(fits.all()):
        wrong = labels[~fits][0].item()
        raise ValueError(f"label {wrong} is outside [0, {vocabulary}) and is not ignore_index={ignore_index}.")
