"""Packed documents against the same documents run apart."""

import pytest
import torch

from lightning_peft.attention_mask import packed_attention_mask
from tests.tiny import tiny_gpt2, tiny_llama


def test_literal():
    low = torch.finfo(torch.float32).min
    mask = packed_attention_mask(torch.tensor([[0, 0, 1, -1]]), torch.float32)
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].tolist() == [
        [0, low, low, low],
        [0, 0, low, low],
        [low, low, 0, low],
        [low, low, low, 0],
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_packed_equals_apart(build, attention, checkpointing):
    network = build(attn_implementation=attention)
    if checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = [[7, 3, 9], [11, 2]]  # lengths of the documents of two rows; the rest of 20 is padding
    ids = torch.randint(5, 128, (2, 20))
    document_ids = torch.full((2, 20), -1)
    position_ids = torch.zeros(2, 20, dtype=torch.long)
    for row, lengths in enumerate(rows):
        begin = 0
        for number, length in enumerate(lengths):
            document_ids[row, begin : begin + length] = number
            position_ids[row, begin : begin + length] = torch.arange(length)
            begin += length
    mask = packed_attention_mask(document_ids, torch.float32)
    packed = network(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    assert packed.isfinite().all()
    upstream = torch.randn_like(packed) * (document_ids >= 0)[:, :, None]
    (packed * upstream).sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    for row, lengths in enumerate(rows):
        begin = 0
        for length in lengths:
            here = slice(begin, begin + length)
            apart = network(input_ids=ids[row : row + 1, here], use_cache=False).logits[0]
            torch.testing.assert_close(packed[row, here], apart, atol=1e-5, rtol=0)
            (apart * upstream[row, here]).sum().backward()
            begin += length
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_stay_finite(dtype):
    network = tiny_llama().to(dtype)
    document_ids = torch.tensor([[0, 0, 0, 1, 1, -1]])
    mask = packed_attention_mask(document_ids, dtype)
    ids = torch.randint(5, 128, (1, 6))
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0]])
    logits = network(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    assert logits.isfinite().all()
    changed = ids.clone()
    changed[0, 0] = 6
    again = network(input_ids=changed, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    assert torch.equal(again[0, 3:5], logits[0, 3:5])
    assert not torch.equal(again[0, 2], logits[0, 2])
