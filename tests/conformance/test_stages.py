"""After training: checkpoints load, stages follow one another, exports are plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.conformance.compare import assert_same, moved
from tests.conformance.data import Rows
from tests.conformance.recorder import weights_of
from tests.conformance.runs import Fitted, Run, build, callbacks_under_test, fit, load, network_of, python_module
from tests.conformance.table import techniques
from tests.tiny import tiny_tokenizer


def reloaded(run: Run, fitted: Fitted, path: str) -> torch.nn.Module:
    """A fresh module with a checkpoint's weights, by what Lightning offers; adapters are attached first."""
    attached = [load(path)(**given) for path, given in callbacks_under_test(run) if hasattr(load(path), "attach")]
    if not attached:
        return type(fitted.module).load_from_checkpoint(path, model=network_of(run), tokenizer=tiny_tokenizer())
    module = python_module(run)
    for callback in attached:
        callback.attach(module)
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module


@techniques("save")
def test_save(technique, tmp_path):
    """`test(ckpt_path="best")` and plain loading give what the checkpoint's step gave (FINDINGS, 18)."""
    run = Run(technique.path, folder=str(tmp_path))
    best = ModelCheckpoint(tmp_path, "best", monitor="val_loss")
    fitted = fit(run, callbacks=[best], enable_checkpointing=True)
    ended = weights_of(fitted.module)
    (tested,) = fitted.trainer.test(fitted.module, fitted.data, ckpt_path="best", verbose=False)
    fresh = reloaded(run, fitted, best.best_model_path)
    assert_same(weights_of(fresh), weights_of(fitted.module), 0.0, "loaded plainly against loaded by test()")
    assert ended.keys() == weights_of(fresh).keys()
    trainer = build(run).trainer
    trainer.callbacks.clear()
    (plain,) = trainer.test(fresh, fitted.data, verbose=False)
    assert plain["test_loss"] == pytest.approx(tested["test_loss"], abs=1e-6)


@techniques("stages")
def test_fit_validate_test_fit(technique, tmp_path):
    """Lightning calls `setup` for every stage: it must change nothing the second time (FINDINGS, 3)."""
    run = Run(technique.path, folder=str(tmp_path))
    fitted = fit(run)
    trainer, module, data, _ = fitted
    ended = weights_of(module)
    (validated,) = trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    assert_same(weights_of(module), ended, 0.0, "after validate and test against after fit")
    (again,) = trainer.validate(module, data, verbose=False)
    assert again == validated
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data)
    further = weights_of(module)
    assert further.keys() == ended.keys(), f"the second fit changed names: {further.keys() ^ ended.keys()}"
    assert moved(ended, further), "the second fit trained nothing"
    assert all(value.isfinite().all() for value in further.values() if value.is_floating_point())


@techniques("export", kinds=("mixin", "callback", "module", "layer"))
def test_export(technique, tmp_path):
    """From the checkpoint and from the module: plain transformers or peft loads it, with the same outputs."""
    from lightning_peft.export import export

    run = Run(technique.path, folder=str(tmp_path / "run"), save=True)
    module = fit(run).module.eval()
    base = tmp_path / "base"
    network_of(run).save_pretrained(base)
    inputs = plain_inputs(run)
    with torch.no_grad():
        expected = module.model(**inputs)[0]
    for name, source in {"module": module, "checkpoint": str(tmp_path / "run" / "last.ckpt")}.items():
        out = tmp_path / name
        export(source, str(out), **({} if name == "module" else {"base": str(base)}))
        network = plain_network(run, out)
        assert not [key for key in network.state_dict() if key.startswith("auxiliary")]
        with torch.no_grad():
            torch.testing.assert_close(network(**inputs)[0], expected, rtol=0, atol=1e-6)


def plain_inputs(run: Run) -> dict[str, torch.Tensor]:
    kind = "images" if run.example.network == "vit" else "tokens"
    batch = next(iter(Rows(kind, batch_size=6).val_dataloader()))
    return {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}


def plain_network(run: Run, folder: Path) -> torch.nn.Module:
    """What transformers or peft make of a folder; every weight must be in it and nothing else."""
    base = network_of(run)
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(base, str(folder)).eval()
    network, info = type(base).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return network.eval()
