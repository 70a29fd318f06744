"""Questions with their traces: what is written, what is learnt, who stays together."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.datamodules import TraceSetCollator, TraceSetData
from lightning_peft.datamodules.resumable_sampler import RepeatedIndex, ResumableSampler
from tests.tiny import tiny_tokenizer

SETS = [
    {"prompt": "a b ", "traces": ["c d", "e f g"]},
    {"prompt": "h ", "traces": ["i"]},
    {"prompt": "j ", "traces": ["k", "l", "m n"]},
]


def data_of(data=SETS, **kwargs) -> TraceSetData:
    options = {"tokenizer": tiny_tokenizer(), "tag_text": "red \n", "batch_size": 2, "shuffle": False}
    return TraceSetData(data, **{**options, **kwargs})


def text(ids: torch.Tensor) -> str:
    return tiny_tokenizer().decode(ids, clean_up_tokenization_spaces=False)


def test_prompt_tag_and_trace_are_written_and_the_trace_is_learnt():
    batch = next(iter(data_of().train_dataloader()))
    assert batch["question_id"].tolist() == [0, 0, 1]
    for row, (prompt, trace) in enumerate([("a b", "c d"), ("a b", "e f g"), ("h", "i")]):
        kept = batch["attention_mask"][row].bool()
        assert text(batch["input_ids"][row][kept]).split() == f"{prompt} red {trace} <|im_end|>".split()
        assert text(batch["labels"][row][batch["labels"][row] != -100]).split() == [*trace.split(), "<|im_end|>"]


def test_rows_may_be_single_traces_in_any_order():
    rows = [{"prompt": s["prompt"], "completion": t, "source": s["prompt"]} for s in SETS for t in s["traces"]]
    single = data_of(rows[::-1], question_column="source")
    sets = [[text(t["input_ids"]) for t in single.rows("train")[i]["traces"]] for i in range(3)]
    assert [len(own) for own in sets] == [3, 1, 2]
    whole = [[text(t["input_ids"]) for t in data_of().rows("train")[i]["traces"]] for i in range(3)]
    assert [own[::-1] for own in sets[::-1]] == whole


def test_conversations_go_through_the_chat_template():
    sets = [{"prompt": [{"role": "user", "content": "yes no"}], "traces": ["a"]}]
    (trace,) = data_of(sets).rows("train")[0]["traces"]
    rendered = tiny_tokenizer().apply_chat_template(sets[0]["prompt"], tokenize=False, add_generation_prompt=True)
    assert text(trace["input_ids"]).split() == [*rendered.split(), "red", "a", "<|im_end|>"]


def test_all_traces_of_a_question_stay_on_one_rank():
    sets = [{"prompt": f"{letter} ", "traces": ["a b", "c", "d e"]} for letter in "fghijkl"]
    rows = data_of(sets).rows("train")
    seen: list[set[int]] = []
    for rank in (0, 1):
        numbers = ResumableSampler(rows, num_replicas=2, rank=rank, shuffle=True, seed=1)
        batch = TraceSetCollator()([rows[i] for i in numbers])
        learnt = batch["question_id"][(batch["labels"] != -100).any(1)]
        assert (torch.bincount(learnt)[torch.bincount(learnt) > 0] == 3).all()
        seen.append(set(learnt.tolist()))
    assert seen[0].isdisjoint(seen[1])
    assert seen[0] | seen[1] == set(range(7))


def test_a_repeated_question_counts_for_nothing():
    rows = data_of().rows("train")
    assert all((trace["labels"] == -100).all() for trace in rows[RepeatedIndex(2)]["traces"])
    assert all((trace["labels"] != -100).any() for trace in rows[2]["traces"])


def test_what_it_needs_is_said():
    with pytest.raises(ValueError, match="question_column="):
        data_of([{"prompt": "a", "completion": "b"}]).rows("train")
    with pytest.raises(ValueError, match="row 1 of the train data has no trace"):
        data_of([SETS[0], {"prompt": "a ", "traces": []}]).rows("train")
    for option in ("packing", "streaming"):
        with pytest.raises(ValueError, match="would part the traces"):
            data_of(**{option: True})
    with pytest.raises(ValueError, match="it needs question_id"):
        TraceSetCollator()([{"traces": [{"input_ids": [1], "labels": [1]}]}])
