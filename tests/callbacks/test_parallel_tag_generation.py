"""Pass@1 and Cons@k of answers generated under tags (paper 33)."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.callbacks import ParallelTagGeneration
from lightning_peft.callbacks.parallel_tag_generation import consensus, extracted_answer, generate_under_tags
from lightning_peft.models import CausalLM
from tests.models.test_causal_lm import quiet_trainer
from tests.tiny import tiny_llama, tiny_tokenizer

TAGS = ["red", "green", "blue"]
QUESTIONS = [
    {"prompt": f"{word} ", "answer": answer} for word, answer in zip("abcde", ["one", "two", "one", "one", "two"])
]


def test_answers_are_the_last_ones_found():
    assert extracted_answer(r"\boxed{1} then \boxed{ 2 }") == "2"
    assert extracted_answer("thinking\nAnswer: 42 \nmore") == "42"
    assert extracted_answer("no answer here") is None
    assert extracted_answer("x=3, x=4", r"x=(\d)") == "4"
    assert extracted_answer("a b c", r"\w") == "c"


def test_consensus_is_the_most_frequent_answer_and_silence_has_no_vote():
    assert consensus(["a", "b", None, "b", None, None]) == "b"
    assert consensus(["b", "a", "a", "b"]) == "b"
    assert consensus([None, None]) is None


class Answering(torch.nn.Module):
    """A network that answers by rule: what it says depends on the tag and on the question."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls: list[torch.Tensor] = []

    def generate(self, input_ids, attention_mask, **options):
        self.calls.append(input_ids)
        tokenizer = tiny_tokenizer()
        ends = []
        for ids in input_ids:
            words = [word for word in tokenizer.decode(ids).split() if word != "<pad>"]
            tag, question = words[-1], words[0]
            # Red knows it always; green and blue say "one", which is right for three of five questions.
            answer = {row["prompt"].strip(): row["answer"] for row in QUESTIONS}[question] if tag == "red" else "one"
            ends.append(tokenizer.convert_tokens_to_ids(["answer", answer]))
        return torch.cat([input_ids, torch.tensor(ends)], 1)


def module() -> CausalLM:
    made = CausalLM(tiny_llama(), tokenizer=tiny_tokenizer())
    made.model = Answering()
    return made


def test_pass_and_consensus_by_hand():
    options = {"tags": TAGS, "tag_text": "{tag} \n", "answer_pattern": r"answer (\w+)", "batch_size": 4}
    scored = ParallelTagGeneration(QUESTIONS, **options).scores(module())
    assert scored.tolist() == [5, 3, 5]  # red is always right; two of three votes say "one"
    blue = ParallelTagGeneration(QUESTIONS, pass_tag=3, samples=6, **options).scores(module())
    assert blue.tolist() == [3, 3, 5]
    shares = [ParallelTagGeneration(QUESTIONS, **options).scores(module(), rank, 2) for rank in (0, 1)]
    assert sum(shares).tolist() == [5, 3, 5]
    network = module()
    ParallelTagGeneration(QUESTIONS, samples=6, **options).scores(network)
    assert sum(len(call) for call in network.model.calls) == 30
    counts = [
        sum(
            int((ids == tiny_tokenizer().convert_tokens_to_ids(tag)).any())
            for call in network.model.calls
            for ids in call
        )
        for tag in TAGS
    ]
    assert counts == [10, 10, 10]


def test_a_real_network_writes_behind_the_tag():
    made = CausalLM(tiny_llama(), tokenizer=tiny_tokenizer()).eval()
    greedy = {"do_sample": False, "max_new_tokens": 4}
    texts = generate_under_tags(made, ["a b ", "c "], ["red \n", "blue \n"], greedy, batch_size=1)
    for prompt, text in zip(["a b red \n", "c blue \n"], texts):
        ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
        expected = made.model.generate(input_ids=ids, pad_token_id=0, attention_mask=torch.ones_like(ids), **greedy)
        assert text == tiny_tokenizer().decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert generate_under_tags(made, ["a b ", "c "], ["red \n", "blue \n"], greedy) == texts  # padded on the left


def test_it_logs_after_validation_and_leaves_random_numbers_alone(tmp_path):
    callback = ParallelTagGeneration(
        QUESTIONS[:2], tags=TAGS, answer_pattern=r"(\w+)", generation={"max_new_tokens": 3}, tag_text="{tag} \n"
    )
    made = CausalLM(tiny_llama(), tokenizer=tiny_tokenizer())
    ids = torch.randint(5, 128, (4, 6))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    callback.scores(made.eval())
    assert torch.equal(torch.get_rng_state(), state)
    loader = torch.utils.data.DataLoader([{k: v[0] for k, v in batch.items()}])
    (logged,) = trainer.validate(made, loader, verbose=False)
    assert {"val_pass@1", "val_cons@3"} <= logged.keys()
    (tested,) = trainer.test(made, loader, verbose=False)
    assert {"test_pass@1", "test_cons@3"} <= tested.keys()


def test_what_it_needs_is_said(tmp_path):
    for given, message in (
        ({"questions": []}, "at least one"),
        ({"questions": [{"prompt": "a"}]}, "'prompt' and 'answer'"),
        ({"samples": 4}, "samples=4 must be a multiple of the 3 tags"),
        ({"pass_tag": 4}, "pass_tag=4"),
        ({"tag_text": "<think>"}, "must have {tag} in it"),
    ):
        with pytest.raises(ValueError, match=message):
            ParallelTagGeneration(**{"questions": QUESTIONS, "tags": TAGS, **given})
    callback = ParallelTagGeneration(QUESTIONS, tags=2)
    with pytest.raises(ValueError, match="does not know the tags"):
        callback.setup(quiet_trainer(tmp_path), CausalLM(tiny_llama(), tokenizer=tiny_tokenizer()), "fit")
    with pytest.raises(ValueError, match="module with a tokenizer"):
        callback.setup(quiet_trainer(tmp_path), CausalLM(tiny_llama()), "fit")
