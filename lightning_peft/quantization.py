"""A network's linear layers in 4 or 8 bits through bitsandbytes, in place, for adapters to sit on."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.delta import digest, is_packed


def quantization_settings(given: dict[str, Any]) -> Any:
    """transformers' `BitsAndBytesConfig`, checked.

    Args:
        given: Its arguments, such as `{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}`.

    Raises:
        ImportError: bitsandbytes cannot be imported.
        ValueError: An argument is not known, or neither 4 nor 8 bits are asked for.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "quantization_config needs the package bitsandbytes, which cannot be imported here: pip install "
            "bitsandbytes, or leave quantization_config out."
        ) from error
    import inspect

    from transformers import BitsAndBytesConfig

    from lightning_peft.adapters.configuration import closest

    known = [
        name for name in inspect.signature(BitsAndBytesConfig.__init__).parameters if name not in ("self", "kwargs")
    ]
    for name in given:
        if name not in known:
            raise ValueError(f"quantization_config has no argument {name!r}; {closest(name, known)}.")
    settings = BitsAndBytesConfig(**given)
    if not (settings.load_in_4bit or settings.load_in_8bit):
        raise ValueError("quantization_config quantises nothing: set load_in_4bit or load_in_8bit to true.")
    return settings


def is_quantized(module: nn.Module) -> bool:
    """Whether any layer holds 4- or 8-bit weights of bitsandbytes."""
    return any(is_packed(part) for part in module.modules())


def quantize(network: Any, given: dict[str, Any]) -> None:
    """Replaces the network's linear layers by bitsandbytes' once; heads stay as they are, as in transformers.

    Each layer keeps the digest of the weight it was made from, by which checkpoints name their base.

    Args:
        network: A transformers network, its weights loaded.
        given: Arguments of transformers' `BitsAndBytesConfig`.

    Raises:
        ImportError, ValueError: See `quantization_settings`.
    """
    settings = quantization_settings(given)
    if is_quantized(network):
        return
    skipped = _skipped(network, settings)
    for name, layer in list(network.named_modules()):
        if type(layer).__name__ not in ("Linear", "Conv1D") or not hasattr(layer, "weight"):
            continue
        if any(name == s or name.endswith(f".{s}") or f".{s}." in f".{name}." for s in skipped):
            continue
        if layer.weight.is_meta:
            raise ValueError(f"{name} has no weights yet (meta device): load the network before it is quantised.")
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, _converted(layer, settings))
    keep_differentiable(network)
    network.is_loaded_in_4bit, network.is_loaded_in_8bit = settings.load_in_4bit, settings.load_in_8bit
    if hasattr(network, "config"):
        network.config.quantization_config = settings


def keep_differentiable(network: nn.Module) -> None:
    """Keeps 4-bit layers on a CPU from packing their weights anew for inference at the first evaluation.

    Where the CPU has AVX512-BF16, bitsandbytes does so in evaluation mode, and what is packed has no gradient: after a
    validation every adapter would have `grad=None` and train no more.
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _skipped(network: nn.Module, settings: Any) -> set[str]:
    names = set(settings.llm_int8_skip_modules or ())
    if hasattr(network, "get_output_embeddings"):
        from transformers.quantizers.base import get_keys_to_not_convert

        names |= set(get_keys_to_not_convert(network))
    # Heads that PEFT trains whole: their copy must be trainable.
    return names | {"classifier", "score", "qa_outputs"}


def _converted(layer: Any, settings: Any) -> nn.Module:
    import bitsandbytes as bnb

    made: Any
    transposed = type(layer).__name__ == "Conv1D"
    weight = layer.weight.detach()
    data = weight.T.contiguous() if transposed else weight
    sizes = (data.shape[1], data.shape[0], layer.bias is not None)
    if settings.load_in_4bit:
        made = bnb.nn.Linear4bit(
            *sizes,
            compute_dtype=settings.bnb_4bit_compute_dtype,
            compress_statistics=settings.bnb_4bit_use_double_quant,
            quant_type=settings.bnb_4bit_quant_type,
            quant_storage=settings.bnb_4bit_quant_storage,
            device="meta",
        )
        made.weight = bnb.nn.Params4bit(
            data,
            requires_grad=False,
            compress_statistics=settings.bnb_4bit_use_double_quant,
            quant_type=settings.bnb_4bit_quant_type,
            quant_storage=settings.bnb_4bit_quant_storage,
            module=made,
        )
    else:
        made = bnb.nn.Linear8bitLt(
            *sizes,
            has_fp16_weights=settings.llm_int8_has_fp16_weight,
            threshold=settings.llm_int8_threshold,
            device="meta",
        )
        made.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=settings.llm_int8_has_fp16_weight)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    made.source_cls = type(layer)
    made.train(layer.training)
    made.__dict__["source_digest"] = digest(weight)
    return made.to(weight.device)  # it is this move that packs the weight
