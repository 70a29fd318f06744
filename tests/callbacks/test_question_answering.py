"""Exact match and F1 of generated answers."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.callbacks import QuestionAnswering
from lightning_peft.callbacks.question_answering import exact_match, normalised_answer, word_f1
from lightning_peft.models import CausalLM
from tests.models.test_causal_lm import quiet_trainer
from tests.tiny import tiny_llama, tiny_tokenizer

QUESTIONS = [
    {"prompt": "a ", "answer": "red green"},
    {"prompt": "b ", "answer": "The cat."},
    {"prompt": "c ", "answer": "dog"},
]


def test_answers_are_compared_as_squad_does():
    assert normalised_answer("An  apple, (the) PIE!") == "apple pie"
    assert exact_match("The cat!", "cat")
    assert not exact_match("cat and dog", "cat")
    assert exact_match("cat and dog", "cat", prefix=True)
    assert not exact_match("the dog", "cat", prefix=True)
    assert word_f1("red car", "blue car red bike") == pytest.approx(2 * (1 * 0.5) / 1.5)
    assert word_f1("car car", "car") == pytest.approx(2 / 3)  # words count as often as both have them
    assert word_f1("bus", "car") == 0
    assert word_f1("", "car") == 0


class Answering(torch.nn.Module):
    """Says "red cat" to everything but "c", to which it says "dog"."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def generate(self, input_ids, attention_mask, **options):
        tokenizer = tiny_tokenizer()
        answers = [["dog", "<pad>"] if "c" in tokenizer.decode(ids).split() else ["red", "cat"] for ids in input_ids]
        return torch.cat([input_ids, torch.tensor([tokenizer.convert_tokens_to_ids(a) for a in answers])], 1)


def test_scores_by_hand_over_ranks():
    module = CausalLM(tiny_llama(), tokenizer=tiny_tokenizer())
    module.model = Answering()
    callback = QuestionAnswering(QUESTIONS, batch_size=2)
    assert callback.scores(module).tolist() == pytest.approx([1, 0.5 + 2 / 3 + 1, 3])
    shares = [callback.scores(module, rank, 2) for rank in (0, 1)]
    assert sum(shares).tolist() == pytest.approx([1, 0.5 + 2 / 3 + 1, 3])


def test_it_is_logged(tmp_path):
    module = CausalLM(tiny_llama(), tokenizer=tiny_tokenizer())
    callback = QuestionAnswering(QUESTIONS, generation={"num_beams": 2, "max_new_tokens": 2})
    ids = torch.randint(5, 128, (2, 5))
    loader = torch.utils.data.DataLoader(
        [{"input_ids": i, "labels": i, "attention_mask": torch.ones_like(i)} for i in ids]
    )
    (logged,) = quiet_trainer(tmp_path, callbacks=[callback]).validate(module, loader, verbose=False)
    assert {"val_exact_match", "val_f1"} <= logged.keys()


def test_what_it_needs_is_said(tmp_path):
    with pytest.raises(ValueError, match="'prompt' and 'answer'"):
        QuestionAnswering([{"prompt": "a"}])
    with pytest.raises(ValueError, match="module with a tokenizer"):
        QuestionAnswering(QUESTIONS).setup(quiet_trainer(tmp_path), CausalLM(tiny_llama()), "fit")
