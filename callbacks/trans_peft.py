"""Trans-PEFT: adapters that still fit when the base is updated (arXiv 2506.06844, ACL 2025).

Updates of a base change what its feed-forward parts know and leave attention patterns as they were; so an adapter is
kept, while it trains, from leaning on either exact neurons or exact parts:

    masking     down(act(gate(h)) * up(h) * m)       m_i = 1[u_i > p_m], u uniform, drawn for each row, token and neuron
    dropping    x + 0 instead of x + FFN(norm(x))    with probability p_d, one draw a layer and forward for all rows

Neither is rescaled by 1 / (1 - p), and nothing acts outside of training (the authors' `models/modeling_qwen2.py`; their
patched Llama also drops attention and adds the residual twice, a slip that is not followed here).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.adapters.beside import first_tensor, with_first
from lightning_peft.sublayers import Sublayer, sublayers, unwrapped


class TransPEFT(L.Callback):
    """Masks neurons and drops whole feed-forward parts while any adapter (or anything else) trains.

    Every draw is a function of the seed, the number of the training batch and the layer (and, for masks, the rank): the
    same in the recomputation of activation checkpointing and after a resume, with no state to keep. A part that is
    dropped is run on no tokens: it costs nothing, and what trains inside of it gets a zero gradient, as DDP needs.

    In a BERT-style block the dropped part includes its norm, so its input passes through unchanged. Norms that stand
    beside the part in a post-norm block (BART, DistilBERT) still act. A network that runs twice in one step (two
    towers) drops the same parts in both.

    Args:
        mask_probability: p_m, share of the neurons before the down projection that is zeroed.
        drop_probability: p_d, chance that a block's feed-forward part is skipped. The authors' script has p_d 0.1 and
            p_m 0 (LoRA of rank 64 on the attention); a reading note names 0.1 to 0.3 for p_m and 0.05 to 0.15 for p_d.
        seed: Seed of the draws.

    Raises:
        ValueError: A probability is not in [0, 1), the network has no feed-forward part that can be masked or dropped,
            or there are two of these callbacks.
    """

    def __init__(self, mask_probability: float = 0.0, drop_probability: float = 0.1, seed: int = 0) -> None:
        for name, value in (("mask_probability", mask_probability), ("drop_probability", drop_probability)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must lie in [0, 1).")
        self.mask_probability, self.drop_probability, self.seed = mask_probability, drop_probability, seed
        self._trainer: L.Trainer | None = None
        self._handles: list[Any] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if sum(isinstance(other, TransPEFT) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("two TransPEFT callbacks would mask and drop the same parts: keep one.")
        self._trainer = trainer

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Only now: adapters that were put in since `setup` belong to what is masked.
        self._release()
        parts = [part for part in sublayers(pl_module) if part.kind == "ffn"]
        modules = dict(pl_module.named_modules())
        for layer, part in enumerate(parts):
            self._place(layer, part, modules)
        if not self._handles and (self.mask_probability or self.drop_probability):
            raise ValueError(f"TransPEFT found no feed-forward part in {type(pl_module).__name__}.")

    def _place(self, layer: int, part: Sublayer, modules: dict[str, Any]) -> None:
        if part.output is None or ".expert" in part.output:
            raise ValueError(
                f"TransPEFT acts on feed-forward parts with one down projection, and {part.block} holds experts."
            )
        if self.drop_probability:
            norm = None if part.post_norm is None else modules[part.post_norm]
            entry, exit_ = (_without_adapter(modules[name]) for name in (part.entry, part.exit))
            self._handles += Skipped(lambda: self._active and self.drops(layer)).place(entry, exit_, norm)
        if self.mask_probability:
            hook = modules[part.output].register_forward_pre_hook(
                lambda _, args: (self.masked(layer, args[0]), *args[1:]) if self._active else None
            )
            self._handles.append(hook)

    @property
    def _active(self) -> bool:
        return self._trainer is not None and self._trainer.training

    def _random(self, *key: int) -> random.Random:
        assert self._trainer is not None
        batch = self._trainer.fit_loop.epoch_loop.total_batch_idx  # in the checkpoint; goes on over epochs and fits
        return random.Random(repr((self.seed, batch, *key)))

    def drops(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is dropped in this batch, the same on all ranks."""
        return self._random(layer).random() < self.drop_probability

    def masked(self, layer: int, inner: Tensor) -> Tensor:
        """The inputs of the down projection [..., neurons] with p_m of them zeroed, by this batch's and rank's mask."""
        assert self._trainer is not None
        generator = torch.Generator(inner.device)
        generator.manual_seed(self._random(layer, self._trainer.global_rank).getrandbits(63))
        kept = torch.rand(inner.shape, generator=generator, device=inner.device) > self.mask_probability
        return inner * kept

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()
        self._trainer = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()


def _without_adapter(module: Any) -> Any:
    """A part inside an adapter that stands around the whole of it; a projection keeps its own (LoRA)."""
    inner = unwrapped(module)
    return module if hasattr(inner, "weight") else inner


class Skipped:
    """A part of a block that returns zeros where `skip` says so: inside, it runs on no tokens.

    Args:
        skip: Asked at each forward of the part.
    """

    def __init__(self, skip: Callable[[], bool]) -> None:
        self.skip = skip
        self._tokens = 0  # what the running forward was to see, 0 while it is not skipped

    def place(self, entry: Any, exit_: Any, post_norm: Any | None) -> list[Any]:
        """Hooks on the part's first module, its last, and the norm of the sum inside of it; they can be removed."""
        handles = [
            entry.register_forward_pre_hook(self._empty, with_kwargs=True),
            exit_.register_forward_hook(self._fill),
        ]
        if post_norm is not None:
            handles.append(post_norm.register_forward_hook(self._pass))
        return handles

    def _empty(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._tokens = 0
        if not self.skip():
            return None
        hidden = first_tensor(args, kwargs)
        self._tokens = hidden.shape[-2]
        return with_first(args, kwargs, hidden[..., :0, :])

    def _fill(self, _: Any, args: Any, output: Tensor) -> Tensor | None:
        return F.pad(output, (0, 0, 0, self._tokens)) if self._tokens else None

    def _pass(self, _: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return args[0] if self._tokens else None
