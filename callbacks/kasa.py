"""KaSA: the network's own singular values, and an update in the form of a singular-value decomposition.

PEFT has the layer (arXiv 2412.06071): each adapted weight loses its r smallest singular components, once, and is
updated by B diag(s) A. Its two regularisers need the training loop, so they are here (equations 9 to 11):

    L = L_task + (beta sum_l sum_k s_lk^2 + gamma sum_l (||B_l^T B_l - I_r||_F + ||A_l A_l^T - I_r||_F)) / layers

The published loop takes the Gram matrices on the large side, [in, in] and [out, out], which can come no nearer to the
identity than about sqrt(in - r), and its layer truncates too little where in > out. Here both are as in the paper and
in PEFT: r x r matrices, and min(in, out) - r components kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as L
import torch
from peft import KasaConfig, LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lightning_peft.adapters.injection import changed_base, network_name
from lightning_peft.callbacks.peft import PEFT
from lightning_peft.loss_terms import LossTerm, add_loss_terms, remove_loss_terms

REDUCTIONS = ("mean", "sum")
ONLY_LINEAR = "PEFT has KaSA for unquantised nn.Linear layers only"


def whole(parameter: Tensor) -> Tensor:
    """A parameter in fp32, gathered if it is sharded (each rank then computes the same, so the gradient is exact)."""
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).float()


def non_orthogonality(factors: Iterable[Tensor]) -> Tensor:
    """sum_i ||M_i M_i^T - I_r||_F over factors M_i [r, n], one batched product for all of a shape."""
    shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for factor in factors:
        shapes[factor.shape].append(factor)
    norms = []
    for shape, group in shapes.items():
        stacked = torch.stack(group)  # [layers, r, n]
        gram = stacked @ stacked.mT - torch.eye(shape[0], device=stacked.device)
        norms.append(torch.linalg.vector_norm(gram, dim=(-2, -1)).sum())
    return torch.stack(norms).sum()


def kasa_terms(layers: list[Any], adapter_name: str) -> tuple[Tensor, Tensor]:
    """sum_l ||s_l||^2 and sum_l (||B_l^T B_l - I||_F + ||A_l A_l^T - I||_F) of PEFT's KaSA layers, in fp32."""
    diagonals = [whole(layer.lora_diag[adapter_name]) for layer in layers]
    factors = [whole(layer.lora_A[adapter_name].weight) for layer in layers]
    factors += [whole(layer.lora_B[adapter_name].weight).mT for layer in layers]
    with torch.autocast(diagonals[0].device.type, enabled=False):
        return torch.cat(diagonals).square().sum(), non_orthogonality(factors)


class KaSA(PEFT):
    """Inserts PEFT's KaSA adapter and adds its two regularisers to the loss of any LightningModule.

    The truncated weights are in every checkpoint (a delta holds them, since they are no longer the base's), so a
    resumed run goes on with the same bits; an exported adapter is PEFT's, and plain `peft` truncates as it loads it.
    Logged: `train_kasa_singular_values` and `train_kasa_orthogonality`, coefficients included.

    The paper trains with learning rates of 3e-4 to 5e-4, linear decay after 6% of warm-up, without weight decay.

    Args:
        r: Rank of the update, and how many singular components each weight loses.
        alpha: The update is scaled by alpha / r.
        beta: Coefficient of the singular values' squares.
        gamma: Coefficient of the factors' distance from orthonormal ones.
        reduction: "mean" over the adapted layers (the published loop) or "sum" (PEFT's `_get_kasa_loss`).
        dropout: Dropout on the adapter's input.
        target_modules: Names of linear layers, or "all-linear"; by default PEFT's choice for the architecture (queries
            and values).
        adapter: Folder of a saved KaSA adapter to go on from; r, alpha, dropout and target_modules are then its own.
        modules_to_save: Names of modules that train whole, besides the task's own.
        autocast_adapter_dtype: Hold the adapter in fp32 where the network is in half precision.
        adapter_name: Name of the adapter; two of these callbacks need two names.
        network: Name of the network inside the module, needed only where it holds more than one.

    Raises:
        ValueError: An argument is out of range, a target is not a plain linear layer or shares its weight, r leaves
            nothing of it, or the module uses manual optimisation.
    """

    def __init__(
        self,
        r: int = 8,
        alpha: int = 16,
        beta: float = 1e-4,
        gamma: float = 1e-3,
        reduction: str = "mean",
        dropout: float = 0.0,
        target_modules: list[str] | str | None = None,
        adapter: str | None = None,
        modules_to_save: list[str] | None = None,
        autocast_adapter_dtype: bool = True,
        adapter_name: str = "default",
        network: str | None = None,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is not known: use one of {REDUCTIONS}.")
        kasa = KasaConfig(beta=beta, gamma=gamma)  # refuses negative coefficients
        config = None
        if adapter is None:
            config = LoraConfig(
                r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, kasa_config=kasa
            )
        super().__init__(config, adapter, None, modules_to_save, autocast_adapter_dtype, adapter_name, network)
        self.beta, self.gamma, self.reduction = beta, gamma, reduction
        suffix = "" if adapter_name == "default" else f"_{adapter_name}"
        self._names = f"kasa_singular_values{suffix}", f"kasa_orthogonality{suffix}"
        self._term = LossTerm(self._names, self._values)
        self._layers: list[Any] = []

    def attach(self, module: L.LightningModule) -> nn.Module:
        try:
            network = super().attach(module)
        except ValueError as error:
            if "variant combination" not in str(error):
                raise
            raise ValueError(
                f"KaSA: {ONLY_LINEAR}, and target_modules={self._config().target_modules} names another kind."
            ) from error
        _check(network, self.adapter_name)
        # What the truncation changed is in the checkpoint itself; this says so to whoever reads it.
        self._state["truncated"] = sorted(changed_base(network))
        return network

    def _config(self) -> Any:
        config: Any = super()._config()
        if getattr(config, "kasa_config", None) is None:
            raise ValueError(f"adapter={self.adapter!r} is no KaSA adapter: use callbacks.PEFT for it.")
        return config

    def _values(self, module: L.LightningModule) -> dict[str, Tensor]:
        if not self._layers:
            self._layers = kasa_layers(module.get_submodule(network_name(module, self.network)), self.adapter_name)
        squares, distance = kasa_terms(self._layers, self.adapter_name)
        scale = 1.0 / len(self._layers) if self.reduction == "mean" else 1.0
        return dict(zip(self._names, (self.beta * scale * squares, self.gamma * scale * distance)))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            add_loss_terms(pl_module, self._term, type(self).__name__)
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        remove_loss_terms(pl_module, self._term)
        self._layers = []
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        remove_loss_terms(pl_module, self._term)


def kasa_layers(network: nn.Module, adapter_name: str) -> list[Any]:
    """The layers that carry this KaSA adapter, in order."""
    return [layer for layer in network.modules() if adapter_name in getattr(layer, "lora_diag", ())]


def _check(network: nn.Module, adapter_name: str) -> None:
    owners = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    for name, layer in network.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in {*layer.lora_A, *layer.lora_embedding_A}:
            continue
        base: Any = layer.get_base_layer()
        if adapter_name not in getattr(layer, "lora_diag", ()):
            raise ValueError(
                f"KaSA: {ONLY_LINEAR}, and {name} is a {type(base).__name__}, which PEFT would give ordinary LoRA."
            )
        if owners[id(base.weight)] > 1:
            raise ValueError(
                f"KaSA: the weight of {name} is also another module's (a tied embedding), which would be truncated "
                "with it: leave it out of target_modules."
            )
