"""DSEE (arXiv 2111.00160): a low-rank and a sparse update on a pruned matrix, as a PEFT tuner.

    y = (W * S1) x + s (U V + S2) x,      s = alpha / r                                           (equation 5)

W [out, in] is frozen. S1 is a mask over W alone: U [out, r], V [r, in] and S2 stay dense and unmasked. S2 [out, in] has
N trainable entries at fixed places Omega: those where W differs most from the low-rank part that GreBsmo finds in it
(the paper), or at random, or where W is largest. U and S2 start at 0, V at normal(0, 0.02), as in the authors' code.

S1 is a buffer of one bit an entry, and W keeps its values: an adapter that is saved holds its mask, one that is
switched off gives the pretrained network back. `dsee_pruning` makes masks; `callbacks.DSEE` trains in stages.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_peft.adapters import add_peft_type, register_with_peft
from lightning_peft.adapters.grebsmo import sparse_positions
from lightning_peft.roles import weights_by_role
from lightning_peft.sublayers import attention_heads, in_features, out_features, sublayers

#: How Omega is chosen; "stored": it comes with the adapter's weights.
POSITIONS = ("grebsmo", "random", "magnitude", "stored")
#: What S1 may do: nothing, take single entries of the blocks' matrices, or whole attention heads.
PRUNE = ("none", "unstructured", "structured")


@dataclass
class DSEEConfig(PeftConfig):
    """A low-rank and a sparse update, and which masks go with them.

    Args:
        r: Rank of U V.
        alpha: The update is scaled by alpha / r.
        num_sparse: N, the trainable entries of S2 in each matrix.
        positions: Omega: "grebsmo", "random", "magnitude" (the repository's "omp"), or "stored", which waits for the
            positions of a saved adapter.
        prune: Which masks S1 there are: "none"; "unstructured", on all matrices of linear layers but heads and
            embeddings, adapted or not; "structured", on attention heads. All start by keeping everything.
        seed: Seed of random positions and of GreBsmo's start.
        target_modules: Names of the linear layers to adapt, a regular expression, or "all-linear"; by default queries
            and values, as PEFT has them for the architecture.
        exclude_modules: Names of layers not to adapt.
        layers_to_transform: Positions of the blocks to adapt, from 0; by default all.
        layers_pattern: Name of the list of blocks, where PEFT does not know it.
        modules_to_save: Names of modules that train whole, besides the task's own heads; they are not pruned.

    Raises:
        ValueError: An argument is out of range.
    """

    r: int = 16
    alpha: int = 32
    num_sparse: int = 64
    positions: str = "grebsmo"
    prune: str = "unstructured"
    seed: int = 0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("dsee")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.r < 1 or self.num_sparse < 1 or self.alpha <= 0:
            raise ValueError(f"r={self.r}, num_sparse={self.num_sparse} and alpha={self.alpha} must be at least 1.")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r} is not known: use one of {POSITIONS}.")
        if self.prune not in PRUNE:
            raise ValueError(f"prune={self.prune!r} is not known: use one of {PRUNE}.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the config beside weights that hold the positions: whoever loads them need not choose any."""
        written = copy.copy(self)
        written.positions = "stored"
        super(DSEEConfig, written).save_pretrained(save_directory, **kwargs)


# -- products ---------------------------------------------------------------------------------------------------------


class AddSparse(torch.autograd.Function):
    """y + scale S2 x, written into y [..., out]; S2 by its values [n], rows [n] and columns [n], x [..., in].

    d loss / d S2 at (i, j) is sum_t dY[t, i] X[t, j]: of dY and X the n columns are gathered, and no [out, in] is made.
    """

    @staticmethod
    def forward(ctx, y, x, values, rows, columns, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, values)
        ctx.rows, ctx.columns, ctx.scale = rows, columns, scale
        ctx.mark_dirty(y)
        return y.index_add_(-1, rows, (x.index_select(-1, columns) * (scale * values)).to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, values = ctx.saved_tensors
        gathered = dy.index_select(-1, ctx.rows)
        dx = d_values = None
        if ctx.needs_input_grad[1]:
            dx = torch.zeros_like(x).index_add_(-1, ctx.columns, (gathered * (ctx.scale * values)).to(x.dtype))
        if ctx.needs_input_grad[2]:
            terms = gathered * x.index_select(-1, ctx.columns)
            d_values = ctx.scale * terms.flatten(0, -2).sum(0, dtype=values.dtype)
        return dy, dx, d_values, None, None, None


def packed(mask: Tensor) -> Tensor:
    """A mask of booleans in bits: byte k has the k-th entries of eight equal parts, the last of which is filled up."""
    flat = F.pad(mask.flatten(), (0, -mask.numel() % 8), value=True).view(8, -1)
    return (flat * _powers(mask.device)).sum(0, dtype=torch.uint8)


def ones_and_zeros(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask that `packed` was given as numbers (a product with bytes is twice as fast as one with booleans)."""
    return (bits & _powers(bits.device)).clamp_(max=1).flatten()[: shape.numel()].view(shape)


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask that `packed` was given."""
    return ones_and_zeros(bits, shape).bool()


def _powers(device: torch.device) -> Tensor:
    return (1 << torch.arange(8, device=device)).to(torch.uint8).unsqueeze(1)  # [8, 1]


class MaskedLinear(torch.autograd.Function):
    """(W * S1) x + b with W [out, in], or Conv1D's with W [in, out]; the masked matrix is never kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, bits, stored_in_out):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight)  # by reference
        ctx.bits, ctx.stored_in_out, ctx.x_dtype = bits, stored_in_out, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        masked = weight * ones_and_zeros(bits, weight.shape)
        y = F.linear(x, masked.t() if stored_in_out else masked, bias)
        ctx.dtype = y.dtype  # in the backward autocast is off, and its products must be those of the forward
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (weight,) = ctx.saved_tensors
        dx = d_bias = None
        if ctx.needs_input_grad[0]:
            masked = (weight * ones_and_zeros(ctx.bits, weight.shape)).to(ctx.dtype)
            dx = (dy.to(ctx.dtype) @ (masked.t() if ctx.stored_in_out else masked)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            d_bias = dy.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return dx, None, d_bias, None, None


# -- layer ------------------------------------------------------------------------------------------------------------


class Filled(BufferDict):
    """A buffer for each adapter that begins with one value throughout, and whether it still is so.

    Args:
        value: What buffers begin with.
    """

    def __init__(self, value: Any) -> None:
        super().__init__(persistent=True)
        self.value = value
        #: Of each adapter, whether every entry has the first value: read once at every change, not in a forward.
        self.blank: dict[str, bool] = {}

    def begin(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """A new buffer."""
        self[name] = torch.full(shape, self.value, dtype=dtype, device=device)
        self.blank[name] = True

    def put(self, name: str, values: Tensor) -> None:
        """New values, in place."""
        self[name].copy_(values)
        self._look()

    def _look(self) -> None:
        self.blank = {n: b.is_meta or bool((b == self.value).all()) for n, b in self.items()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._look()


class DSEELayer(nn.Module, BaseTunerLayer):
    """A linear layer with, of each adapter, an update, a mask, or both.

    Args:
        base_layer: `nn.Linear`, transformers' Conv1D, or one of these in 4 or 8 bits.

    Raises:
        TypeError: It is another kind.
    """

    adapter_layer_names = ("dsee_U", "dsee_V", "dsee_S")
    other_param_names = ("dsee_positions", "dsee_mask", "dsee_columns", "scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.stored_in_out = type(base).__name__ in ("Conv1D", "FSDPConv1D")
        self.quantization_backend = resolve_quantization_backend(base)
        if not (isinstance(base, nn.Linear) or self.stored_in_out or self.quantization_backend):
            raise TypeError(f"DSEE adapts linear layers (nn.Linear, Conv1D), and this is a {type(base).__name__}.")
        self.in_features, self.out_features = in_features(base), out_features(base)
        self.scaling: dict[str, float] = {}
        self.dsee_U, self.dsee_V, self.dsee_S = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.dsee_positions = Filled(-1)  # rows and columns of S2's entries, [2, n]
        self.dsee_mask = Filled(255)  # S1 as W is stored, packed
        self.dsee_columns = Filled(True)  # which inputs are read, [in]: those of the heads that are kept
        self.merged_adapters: list[str] = []
        self._masked_out: Tensor | None = None  # what a merge has set to 0

    def add_update(self, adapter_name: str, config: DSEEConfig) -> None:
        """U, V and S2, of which the positions are yet to be set."""
        if config.num_sparse > self.in_features * self.out_features:
            raise ValueError(
                f"num_sparse={config.num_sparse} and a matrix of [{self.out_features}, {self.in_features}] has "
                f"{self.in_features * self.out_features} entries."
            )
        self.scaling[adapter_name] = config.alpha / config.r
        self.dsee_U[adapter_name] = nn.Parameter(torch.zeros(self.out_features, config.r))
        self.dsee_V[adapter_name] = nn.Parameter(torch.randn(config.r, self.in_features) * 0.02)
        self.dsee_S[adapter_name] = nn.Parameter(torch.zeros(config.num_sparse))
        self.dsee_positions.begin(adapter_name, (2, config.num_sparse), torch.long, self._device())
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def add_mask(self, adapter_name: str) -> None:
        """S1, which keeps everything.

        Raises:
            ValueError: The weight is in 4 or 8 bits.
        """
        if self.quantization_backend is not None:
            raise ValueError(
                "DSEE cannot prune entries of a weight that is stored in 4 or 8 bits: use prune='none' or "
                "'structured' (whole heads), or load the network unquantised."
            )
        size = math.ceil(self.in_features * self.out_features / 8)
        self.dsee_mask.begin(adapter_name, (size,), torch.uint8, self._device())

    def add_columns(self, adapter_name: str) -> None:
        """A mask of the inputs, which keeps everything."""
        self.dsee_columns.begin(adapter_name, (self.in_features,), torch.bool, self._device())

    def _device(self) -> torch.device:
        return next(self.get_base_layer().parameters()).device

    def pretrained(self) -> Tensor:
        """W as [out, in], dequantised."""
        weight = self.get_base_weight().detach()
        return weight.t() if self.stored_in_out else weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s (U V + S2), as W is stored."""
        delta = self.dsee_U[adapter].detach() @ self.dsee_V[adapter].detach()
        rows, columns = self._positions(adapter)
        delta[rows, columns] += self.dsee_S[adapter].detach()
        delta *= self.scaling[adapter]
        return delta.t() if self.stored_in_out else delta

    def _positions(self, adapter: str) -> tuple[Tensor, Tensor]:
        if self.dsee_positions.blank[adapter]:
            raise RuntimeError(
                f"the positions of adapter {adapter!r}'s sparse entries have been neither drawn nor loaded: load its "
                "weights, or use positions='grebsmo', 'random' or 'magnitude'."
            )
        rows, columns = self.dsee_positions[adapter]
        return rows, columns

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        for name in self._pruning(self.dsee_columns, self.active_adapters):
            x = x * self.dsee_columns[name].to(x.dtype)
        masks = [self.dsee_mask[name] for name in self._pruning(self.dsee_mask, self.active_adapters)]
        # Once W is masked, the base layer itself is not called: hooks belong on this module.
        result = self._masked(x, masks) if masks else self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.dsee_U:
                result = result + self._update(x, name)
        return result.to(dtype)

    def _pruning(self, masks: Filled, names: list[str]) -> list[str]:
        """The adapters whose masks take something away."""
        return [name for name in names if not masks.blank.get(name, True)]

    def _masked(self, x: Tensor, masks: list[Tensor]) -> Tensor:
        """(W * S1) x + b; S1 keeps what every active adapter's mask keeps."""
        bits = masks[0]
        for mask in masks[1:]:
            bits = bits & mask
        base: Any = self.get_base_layer()
        if base.weight.requires_grad:  # trained by someone else
            weight = base.weight * ones_and_zeros(bits, base.weight.shape)
            return F.linear(x, weight.t() if self.stored_in_out else weight, base.bias)
        return MaskedLinear.apply(x, base.weight, base.bias, bits, self.stored_in_out)

    def _update(self, x: Tensor, name: str) -> Tensor:
        """s (U V + S2) x."""
        u, v, scale = self.dsee_U[name], self.dsee_V[name], self.scaling[name]
        kind = x.device.type
        # One copy for both products, where autocast would make one for each.
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x.to(u.dtype)
        low_rank = F.linear(F.linear(x, v) * scale, u)
        return AddSparse.apply(low_rank, x, self.dsee_S[name], *self._positions(name), scale)

    # -- merging --------------------------------------------------------------------------------------------------

    @property
    def _weight(self) -> nn.Parameter:
        base: Any = self.get_base_layer()
        return base.weight

    def kept(self, names: list[str]) -> Tensor | None:
        """Which entries of W are kept under some adapters, as W is stored; None for all."""
        shape = self._weight.shape
        masks = [unpacked(self.dsee_mask[name], shape) for name in self._pruning(self.dsee_mask, names)]
        for name in self._pruning(self.dsee_columns, names):
            columns = self.dsee_columns[name]
            masks.append((columns.unsqueeze(1) if self.stored_in_out else columns).expand(shape))
        if not masks:
            return None
        return torch.stack(masks).all(0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes (W * S1) + s (U V + S2) into W.

        Args:
            safe_merge: Leave W as it is if anything would not be finite.
            adapter_names: Which adapters; by default the active ones.

        Raises:
            ValueError: W is in 4 or 8 bits, or something is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        if self.quantization_backend is not None:
            raise ValueError("merging into a weight of 4 or 8 bits rounds the update away: keep the adapter as it is.")
        together = [*self.merged_adapters, *names]
        if self.merged:
            self.unmerge()
        weight = self._weight
        kept = self.kept(together)
        merged = weight.data if kept is None else torch.where(kept, weight.data, 0)
        for name in together:
            if name in self.dsee_U:
                merged = merged + self._read(name, self.get_delta_weight(name), together)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merged, the weight would not be finite: the adapter {together} seems to be broken.")
        self._masked_out = None if kept is None else weight.data[~kept]
        weight.data = merged.to(weight.dtype)
        self.merged_adapters = together

    def unmerge(self) -> None:
        """W again: what was masked exactly, everything else to rounding."""
        weight, names = self._weight, self.merged_adapters
        plain = weight.data
        for name in names:
            if name in self.dsee_U:
                plain = plain - self._read(name, self.get_delta_weight(name), names)
        plain = plain.to(weight.dtype)
        kept = self.kept(names)
        if kept is not None and self._masked_out is not None:
            plain[~kept] = self._masked_out
        weight.data, self.merged_adapters, self._masked_out = plain, [], None

    def _read(self, name: str, delta: Tensor, names: list[str]) -> Tensor:
        """An update without its columns for inputs that are masked."""
        for other in self._pruning(self.dsee_columns, names):
            columns = self.dsee_columns[other]
            delta = delta * (columns.unsqueeze(1) if self.stored_in_out else columns)
        return delta


def dsee_layers(network: nn.Module, adapter_name: str) -> dict[str, DSEELayer]:
    """The layers that hold something of an adapter, by their names in the network."""
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in network.named_modules()
        if isinstance(layer, DSEELayer)
        and any(adapter_name in own for own in (layer.dsee_U, layer.dsee_mask, layer.dsee_columns))
    }


def draw_positions(network: nn.Module, adapter_name: str, method: str, seed: int = 0) -> dict[str, Tensor]:
    """Omega of every matrix that has an update, by the layer's name; see `sparse_positions`."""
    drawn = {}
    for i, (name, layer) in enumerate(dsee_layers(network, adapter_name).items()):
        if adapter_name not in layer.dsee_U:
            continue
        weight = layer.pretrained()
        if weight.is_meta:
            raise ValueError(f"positions={method!r} reads the weights, and {name} has none (meta device).")
        drawn[name] = sparse_positions(weight, len(layer.dsee_S[adapter_name]), method, seed + i)
    return drawn


def set_positions(network: nn.Module, adapter_name: str, drawn: dict[str, Tensor]) -> None:
    """Lets S2's entries stand where `draw_positions` has chosen."""
    layers = dsee_layers(network, adapter_name)
    for name, positions in drawn.items():
        layers[name].dsee_positions.put(adapter_name, positions)


# -- places -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """An attention's projections, by name, and its heads.

    Args:
        query, key, value, output: The layers.
        module: The module that holds the number of heads.
        groups: Key-value heads, each with as many queries: what is dropped or kept together.
        queries: Queries of a group.
        width: Size of a head.
    """

    query: str
    key: str
    value: str
    output: str
    module: str
    groups: int
    queries: int
    width: int


def attentions(network: nn.Module) -> list[Attention]:
    """The attentions of every block.

    Raises:
        ValueError: An attention's queries, keys and values are not layers of their own.
    """
    owners: dict[tuple[str, str], str] = {}
    for weight in weights_by_role(network):
        if weight.role in ("attention.q", "attention.k", "attention.v") and not weight.is_bias:
            owner = _owner(weight.name)
            owners[owner.rpartition(".")[0], weight.role[-1]] = owner
    found = []
    for part in sublayers(network):
        if part.kind == "ffn":
            continue
        inside = (part.query or "").rpartition(".")[0]
        key, value = owners.get((inside, "k")), owners.get((inside, "v"))
        if part.query is None or part.output is None or key is None or value is None:
            raise ValueError(
                f"prune='structured' drops attention heads and needs queries, keys, values and output as layers of "
                f"their own, which {part.entry} has not: use prune='unstructured'."
            )
        heads = attention_heads(network, part.entry)
        width = out_features(network.get_submodule(part.query)) // heads
        groups = out_features(network.get_submodule(value)) // width
        found.append(Attention(part.query, key, value, part.output, part.entry, groups, heads // groups, width))
    return found


def linear_layers(network: nn.Module, not_these: list[str]) -> set[str]:
    """Names of the linear layers that are neither heads nor embeddings, and not in modules named in `not_these`."""
    found = set()
    for weight in weights_by_role(network, need_blocks=False):
        pruned = weight.role.startswith(("attention.", "ffn.", "expert.")) or weight.role == "other"
        name = _owner(weight.name)
        segments = set(name.split("."))
        if weight.layout is None or not pruned or segments & {"original_module", "modules_to_save", *not_these}:
            continue
        if not any(name == other or name.endswith(f".{other}") for other in not_these):
            found.add(name)
    return found


def _owner(weight: str) -> str:
    return weight.rpartition(".")[0].removesuffix(".base_layer")


class DSEEModel(BaseTuner):
    """The tuner: updates on the layers that are adapted, masks on those that may be pruned."""

    prefix: str = "dsee_"
    tuner_layer_cls = DSEELayer
    target_module_mapping = dict(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)  # type: ignore[arg-type]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        entries, heads = peft_config.prune == "unstructured", peft_config.prune == "structured"
        self.masked = linear_layers(model, peft_config.modules_to_save or []) if entries else set()
        self.columns = {part.output for part in attentions(model)} if heads else set()

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self.masked | self.columns or bool(check_target_module_exists(peft_config, key))

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, DSEELayer) else DSEELayer(target)
        if check_target_module_exists(peft_config, current_key):
            layer.add_update(adapter_name, peft_config)
        if current_key in self.masked:
            layer.add_mask(adapter_name)
        if current_key in self.columns:
            layer.add_columns(adapter_name)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """PEFT's own, and then the positions, which read the weights that are there now."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = dsee_layers(model, adapter_name)
        adapted = [layer for layer in layers.values() if adapter_name in layer.dsee_U]
        config: Any = self.peft_config[adapter_name]
        if not adapted:
            raise ValueError(f"target_modules={config.target_modules}: no linear layer has such a name.")
        if config.positions != "stored" and not any(layer.pretrained().is_meta for layer in adapted):
            set_positions(model, adapter_name, draw_positions(model, adapter_name, config.positions, config.seed))


register_with_peft()
