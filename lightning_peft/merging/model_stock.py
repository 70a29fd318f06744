"""Model Stock: between the average of a few fine-tuned models and their base, by the angle between their deltas.

For N models, theta_k = theta0 + delta_k and per tensor (arXiv 2403.19522, "N fine-tuned models")

    cos = mean over pairs of <delta_a, delta_b> / (|delta_a| |delta_b|),   t = N cos / (1 + (N - 1) cos)
    theta = t * mean_k theta_k + (1 - t) * theta0

The paper names one angle; for N > 2 mergekit averages pairwise cosines (the default here), others the angles. Where the
published two-model code adds 1e-8 to the norms this divides exactly and tests for zero.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_peft.merging.same_tensors import check_same_tensors
from lightning_peft.merging.streaming import SafetensorsFolder

PAIRWISE = ("cos", "angle")
COMPAT = (None, "mergekit")
#: Elements worked on at once: beside the tensors themselves, a few times this many fp64 numbers are held.
CHUNK = 2**20


def model_stock(
    base: str | Mapping[str, Tensor],
    models: Sequence[str | Mapping[str, Tensor]],
    filter_wise: bool = False,
    pairwise: str = "cos",
    clamp: bool = False,
    compat: str | None = None,
    keep_base_vocabulary: bool = False,
) -> dict[str, Tensor]:
    """Merges whole models in memory; `lightning_peft.merging.merge` does the same from disk to disk.

    Integer and boolean buffers are the base's. Names that share one tensor in the base (tied embeddings) share it in
    the result.

    Args:
        base: The pretrained model: a state dict, or a folder of safetensors.
        models: The fine-tuned models, at least two, in any order, with the base's tensors.
        filter_wise: One angle for each slice along the last dimension (a row of a matrix) instead of one a tensor.
        pairwise: Mean over pairs of the "cos" or of the "angle"; the same for two models.
        clamp: Keep t in [0, 1]; the authors do not (t < 0 where deltas point away from each other).
        compat: "mergekit" bounds the product of two norms from below by 1e-6, as it does.
        keep_base_vocabulary: Take the base's tensor where a model's vocabulary has been resized.

    Raises:
        ValueError: Fewer than two models, an unknown option, or models with other tensors; the message lists them.
    """
    check_options(len(models), pairwise, compat)
    theta0: Mapping[str, Tensor] = SafetensorsFolder(base) if isinstance(base, str) else base
    thetas = [SafetensorsFolder(model) if isinstance(model, str) else model for model in models]
    kept = check_same_tensors(theta0, thetas, keep_base_vocabulary)
    merged: dict[str, Tensor] = {}
    first: dict[tuple[int, ...], str] = {}  # where all of a name's tensors lie -> the name that was merged already
    for name, tensor in theta0.items():
        if not tensor.is_floating_point() or name in kept:
            merged[name] = tensor.clone()
            continue
        tensors = [theta[name] for theta in thetas]
        place = tuple(key for t in (tensor, *tensors) for key in (t.data_ptr(), *t.shape, *t.stride()))
        same = first.setdefault(place, name) if tensor.numel() else name
        if same == name:
            merged[name] = model_stock_tensor(tensor, tensors, filter_wise, pairwise, clamp, compat)
        else:
            merged[name] = merged[same]
    return merged


@torch.no_grad()
def model_stock_tensor(
    base: Tensor,
    tensors: Sequence[Tensor],
    filter_wise: bool = False,
    pairwise: str = "cos",
    clamp: bool = False,
    compat: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One merged tensor, a new one; differences and sums are in fp64 whatever the storage.

    Args:
        base: theta0, of any shape.
        tensors: theta_1 ... theta_N, N >= 2, of its shape.
        filter_wise: One angle for each slice along the last dimension instead of one for the tensor.
        pairwise: Mean over pairs of the "cos" or of the "angle".
        clamp: Keep t in [0, 1].
        compat: "mergekit" for its bound on the norms.
        dtype: Of the result; by default the base's.

    Raises:
        ValueError: Fewer than two models, another shape, or an unknown option.
    """
    check_options(len(tensors), pairwise, compat)
    if any(tensor.shape != base.shape for tensor in tensors):
        raise ValueError(f"shapes differ: base {tuple(base.shape)}, models {[tuple(t.shape) for t in tensors]}.")
    ratio = interpolation_ratio(inner_products(base, tensors, filter_wise), pairwise, clamp, compat)
    return interpolate(base, tensors, ratio, dtype)


def inner_products(base: Tensor, tensors: Sequence[Tensor], filter_wise: bool = False) -> Tensor:
    """<delta_a, delta_b> for all pairs of models: [1, N, N], or filter-wise [rows, N, N]; fp64.

    Shards of one tensor add up: sum this over the ranks that hold them, and go on with `interpolation_ratio`.
    """
    n = len(tensors)
    rows = _rows(base, filter_wise).shape[0] if filter_wise else 1
    dots = torch.zeros(rows, n, n, dtype=torch.float64, device=base.device)
    for where, (theta0, *thetas) in _chunks([base, *tensors], filter_wise):
        # Squares of tiny deltas would leave fp32's range, and sums over 10^8 elements its precision.
        deltas = torch.stack([theta.double() - theta0.double() for theta in thetas], 1)  # [rows, N, elements]
        products = deltas @ deltas.transpose(1, 2)
        if filter_wise:
            dots[where] = products
        else:
            dots += products.sum(0)
    return dots


def interpolation_ratio(dots: Tensor, pairwise: str = "cos", clamp: bool = False, compat: str | None = None) -> Tensor:
    """t of each tensor or filter, [...] in fp64, from the inner products of its deltas, [..., N, N].

    A zero delta counts as orthogonal, so a tensor that a model left alone gives no NaN, and one that no model changed
    gives 0 (the base); so does a denominator of 0 (deltas that cancel).

    Raises:
        ValueError: An unknown option.
    """
    n = dots.shape[-1]
    check_options(n, pairwise, compat)
    dots = dots.double()
    norms = dots.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    products = norms[..., :, None] * norms[..., None, :]
    if compat == "mergekit":
        cosines = dots / products.clamp(min=1e-6)
    else:
        cosines = torch.where(products > 0, dots / torch.where(products > 0, products, 1.0), 0.0)
    a, b = torch.triu_indices(n, n, 1, device=dots.device)
    pairs = cosines[..., a, b].clamp(-1, 1)
    cos = pairs.mean(-1) if pairwise == "cos" else pairs.acos().mean(-1).cos()
    denominator = 1 + (n - 1) * cos
    singular = denominator.abs() < 1e-6
    t = torch.where(singular, 0.0, n * cos / torch.where(singular, 1.0, denominator))
    return t.clamp(0, 1) if clamp else t


def interpolate(base: Tensor, tensors: Sequence[Tensor], ratio: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """t mean_k theta_k + (1 - t) theta0, with t of [1] or one for each row, [rows]; a new tensor.

    Exact at both ends: t = 0 gives theta0 to the bit, and t = 1 with identical models gives them.
    """
    filter_wise = ratio.numel() != 1
    merged = torch.empty_like(base, dtype=dtype or base.dtype, memory_format=torch.contiguous_format)
    chunks = _chunks([base, *tensors, merged], filter_wise)
    for where, (theta0, *thetas, out) in chunks:
        average = functools.reduce(torch.add, (theta.double() for theta in thetas)) / len(thetas)
        t = ratio.double()[where, None] if filter_wise else ratio.double()
        # Its last digits are the square roots' rounding; without them identical models are themselves.
        t = torch.where((t - 1).abs() < 1e-14, 1.0, t)
        out.copy_(t * average + (1 - t) * theta0.double())
    return merged


def _rows(tensor: Tensor, filter_wise: bool) -> Tensor:
    """As [rows, elements]: a row is a filter, or all there is."""
    if tensor.numel() == 0:
        return tensor.reshape(0, 1)
    return tensor.reshape(-1, tensor.shape[-1] if filter_wise and tensor.ndim else tensor.numel())


def _chunks(tensors: Sequence[Tensor], filter_wise: bool) -> Iterator[tuple[slice, list[Tensor]]]:
    """Parts of the tensors that fit together, [rows, elements] each, and which rows they are."""
    tables = [_rows(tensor, filter_wise) for tensor in tensors]
    if tables[0].numel() == 0:
        return
    if filter_wise:
        step = max(1, CHUNK // tables[0].shape[1])
        for start in range(0, tables[0].shape[0], step):
            where = slice(start, start + step)
            yield where, [table[where] for table in tables]
        return
    for start in range(0, tables[0].shape[1], CHUNK):
        yield slice(0, 1), [table[:, start : start + CHUNK] for table in tables]


def check_options(n: int, pairwise: str = "cos", compat: str | None = None) -> None:
    """Raises `ValueError` for an option that is not known, and for fewer than two models: there is no angle."""
    if n < 2:
        raise ValueError(
            f"Model Stock needs at least two fine-tuned models beside their base and got {n}: fine-tune the base once "
            "more with another seed."
        )
    if pairwise not in PAIRWISE:
        raise ValueError(f"pairwise={pairwise!r} is not known: use one of {PAIRWISE}.")
    if compat not in COMPAT:
        raise ValueError(f"compat={compat!r} is not known: use 'mergekit', or None for the paper's formula.")
