"""Learning nodes (paper 52): replies taken apart to the letter, three passes kept, a network writes its own rows."""

from __future__ import annotations

import functools
import json
import logging

import pytest
import torch

from lightning_peft.datamodules import LearningNodeDistillation
from lightning_peft.datamodules.answers import prompt_ids
from lightning_peft.datamodules.collate import collate
from lightning_peft.datamodules.learning_nodes import behind_thought, list_items, reasoning_and_answer
from lightning_peft.models import CausalLM
from tests.datamodules.subwords import subword_tokenizer
from tests.models.test_causal_lm import quiet_trainer
from tests.tiny import tiny_llama, tiny_tokenizer

TEXTS = [{"text": "the cat sat on red"}, {"text": "the dog sat on blue"}, {"text": "good bye"}]
REQUESTS = {
    "nodes_request": "nodes {count}: {text}",
    "questions_request": "questions {count}: {node} | {text}",
    "solution_request": "solve: {question} | {node} | {text}",
}
REPLIES = {
    "nodes 8: the cat sat on red": "Here they are:\n- the cat sat\n- it sat on red\n- The cat sat\n",
    "nodes 8: the dog sat on blue": "1. the dog sat\n   on blue\n",
    "nodes 8: good bye": "There is nothing to learn from it.",
    "questions 6: the cat sat | the cat sat on red": "- who sat ?\n- what is red ?\n",
    "questions 6: it sat on red | the cat sat on red": "* What is red ?\n",
    "questions 6: the dog sat on blue | the dog sat on blue": "I have none.",
    "solve: who sat ? | the cat sat | the cat sat on red": "Reasoning: it says\nso\n\n**Answer:** the cat",
    "solve: what is red ? | the cat sat | the cat sat on red": "It is the mat.",
}
ROWS = [{"source": 0, "node": "the cat sat", "question": "who sat ?", "reasoning": "it says\nso", "answer": "the cat"}]
LOST = {
    "requests too long": 0,
    "texts without nodes": 1,
    "nodes without questions": 1,
    "questions asked twice": 1,
    "questions without reasoning or answer": 1,
}


class Teacher:
    """Replies as `REPLIES` says, and remembers what it was asked.

    Args:
        stops_at: The request at which it fails.
        fingerprint: What tells it from others.
    """

    def __init__(self, stops_at: str | None = None, fingerprint: str = "of the tests") -> None:
        self.asked: list[str] = []
        self.stops_at, self.fingerprint = stops_at, fingerprint

    def __call__(self, requests: list[str]) -> list[str]:
        for request in requests:
            if request == self.stops_at:
                raise RuntimeError("killed")
            self.asked.append(request)
        return [REPLIES[request] for request in requests]


def data_of(folder, generator=None, data=TEXTS, **kwargs) -> LearningNodeDistillation:
    options = {"tokenizer": tiny_tokenizer(), "cache_dir": str(folder), "shard_size": 1, **REQUESTS, **kwargs}
    return LearningNodeDistillation(data, generator or Teacher(), **options)


# -- replies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "items"),
    [
        ("- one\n- two", ["one", "two"]),
        ("Of course:\n\n* one\n\n  * two -- with more\n", ["one", "two -- with more"]),
        ("1. one\n   goes on\n2) two\n\nand on", ["one goes on", "two and on"]),
        ("10. ten\n• eleven", ["ten", "eleven"]),
        ("-5 is a number\n3.5 too", []),
        ("", []),
    ],
)
def test_items_of_a_list(reply, items):
    assert list_items(reply) == items


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        ("Reasoning: a\nb\nAnswer: c\nd", ("a\nb", "c\nd")),
        ("**Reasoning:**\na\n\n**Answer:** c", ("a", "c")),
        ("a: the answer: is near\nanswer : c", ("a: the answer: is near", "c")),
        ("Reasoning: a\nAnswer: no, wait\nb\nAnswer: c", ("a\nAnswer: no, wait\nb", "c")),
        ("Answer: c", ("", "c")),
        ("Reasoning: a\nAnswer:", ("a", "")),
        ("a, so c", ("", "")),
    ],
)
def test_reasoning_and_answer(reply, parts):
    assert reasoning_and_answer(reply) == parts


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("<think>\n- not this\n</think>\n- this", "\n- this"),
        ("- not this\n</think>- this", "- this"),  # the first mark was part of the request
        ("<think>\n- not this\n- nor this", ""),
        ("- this", "- this"),
    ],
)
def test_of_a_thought_only_what_follows_counts(reply, said):
    assert behind_thought(reply, ("<think>", "</think>")) == said


# -- rows --------------------------------------------------------------------------------------------------------------


def test_texts_become_questions_with_worked_answers(tmp_path):
    teacher = Teacher()
    made = data_of(tmp_path, teacher)
    assert made.distilled([row["text"] for row in TEXTS]) == (ROWS, LOST)
    # Each request once, and only for what the passes before it gave.
    assert sorted(teacher.asked) == sorted(REPLIES)


def test_what_is_left_out_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        data_of(tmp_path).examples("train")
    assert (
        "train data: 1 questions on 1 nodes of 3 texts; left out: 1 texts without nodes, 1 nodes without questions, "
        "1 questions asked twice, 1 questions without reasoning or answer." in caplog.text
    )


@pytest.mark.parametrize("conversational", [True, False])
def test_the_text_is_gone_and_reasoning_and_answer_are_learnt(tmp_path, conversational):
    tokenizer = subword_tokenizer(["the cat sat"], entries=280)
    tokenizer.chat_template = tokenizer.chat_template if conversational else None
    made = data_of(tmp_path, tokenizer=tokenizer)
    (example,) = made.examples("train")
    response = "<think>\nit says\nso\n</think>\nthe cat"
    if conversational:
        expected = [{"role": "user", "content": "who sat ?"}, {"role": "assistant", "content": response}]
        assert example == {"messages": expected, "node": "the cat sat", "source": 0}
    else:
        expected = {"prompt": "who sat ?\n", "completion": response}
        assert example == {**expected, "node": "the cat sat", "source": 0}
    (row,) = made.rows("train")
    learnt = tokenizer.decode(row["labels"][row["labels"] != -100], skip_special_tokens=True)
    assert learnt.strip() == response
    assert "red" not in tokenizer.decode(row["input_ids"])


def test_columns_of_a_text_are_those_of_its_questions(tmp_path):
    rows = [{**row, "weight": 1.0 + n, "page": n} for n, row in enumerate(TEXTS)]
    (row,) = data_of(tmp_path, data=rows, keep_columns=["page"]).rows("train")
    assert (row["weight"], row["page"]) == (1.0, 0)


def test_limits_on_nodes_and_questions(tmp_path):
    made = data_of(tmp_path, echo_list, nodes_per_text=2, questions_per_node=1)
    rows, _ = made.distilled(["a"])
    assert [(row["node"], row["question"]) for row in rows] == [("n0", "n0 q0"), ("n1", "n1 q0")]


def echo_list(requests: list[str]) -> list[str]:
    """Three items to every request, or a solution."""

    def reply(request: str) -> str:
        kind, _, rest = request.partition(": ")
        node = rest.split(" | ")[0]
        items = {"nodes": "n{}", "questions": node + " q{}"}.get(kind.split()[0])
        return "so\nAnswer: yes" if items is None else "\n".join(f"- {items.format(i)}" for i in range(3))

    return [reply(request) for request in requests]


def test_splits_have_texts_of_their_own_and_questions_stay_questions(tmp_path):
    texts = [{"text": letter} for letter in "abcdef"]
    given = [{"prompt": "who ? ", "completion": "the cat"}]
    made = data_of(tmp_path, named, texts, validation=0.5, test=given)
    train, validation, test = (made.examples(split) for split in ("train", "validation", "test"))
    told = [{row["node"] for row in rows} for rows in (train, validation)]
    assert len(told[0]) == len(told[1]) == 3
    assert not told[0] & told[1]
    assert list(test) == given


def named(requests: list[str]) -> list[str]:
    """One node, question and answer for each text, which all name it."""
    return [
        f"so\nAnswer: {request[-1]}" if request.startswith("solve") else f"- about {request[-1]}"
        for request in requests
    ]


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_a_second_asks_nothing(tmp_path):
    requests = list(REPLIES)
    killed = Teacher(stops_at=requests[4])
    with pytest.raises(RuntimeError, match="killed"):
        data_of(tmp_path, killed).examples("train")
    assert killed.asked == requests[:4]
    rest, nothing = Teacher(), Teacher()
    first = list(data_of(tmp_path, rest).examples("train"))
    assert rest.asked == requests[4:]
    assert list(data_of(tmp_path, nothing).examples("train")) == first
    assert nothing.asked == []


@pytest.mark.parametrize(
    "change",
    [
        {"generator": Teacher(fingerprint="another")},
        {"data": TEXTS[:2]},
        {"nodes_request": "nodes 8: {text}", "shard_size": 2},
    ],
)
def test_the_cache_knows_what_replies_depend_on(change, tmp_path):
    data_of(tmp_path).examples("train")
    folders = set((tmp_path / "learning_nodes").iterdir())
    data_of(tmp_path, **change).examples("train")
    made = set((tmp_path / "learning_nodes").iterdir()) - folders
    # Other texts may come to the same questions: then these are not asked anew.
    assert len(made) == (1 if "data" in change else 3)
    settings = json.loads((next(iter(made)) / "settings.json").read_text())
    assert settings["generator"].startswith(f"{__name__}.Teacher:")


# -- a network ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught():
    """A network that has learnt by heart what the teacher would reply, and its tokenizer."""
    tokenizer = subword_tokenizer([*REPLIES, *REPLIES.values()], entries=400)
    rows = []
    for request, reply in REPLIES.items():
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": request}])
        answer = tokenizer(reply)["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    network = tiny_llama(vocab_size=len(tokenizer), hidden=64)
    batch, optimizer = collate(rows, pad_token_id=0), torch.optim.AdamW(network.parameters(), 5e-3)
    for _ in range(150):
        _, nll = CausalLM(network).row_losses(batch)
        optimizer.zero_grad()
        nll.mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    assert nll.max() < 0.3, "the network did not learn the replies: the test has no ground"
    return network, tokenizer


def test_the_network_in_training_writes_its_own_rows(taught, tmp_path):
    network, tokenizer = taught
    options = {**REQUESTS, "cache_dir": str(tmp_path), "generation": {"max_new_tokens": 60}}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    data = LearningNodeDistillation(TEXTS, **options)
    module = CausalLM(network, tokenizer=tokenizer, learning_rate=0.0)
    quiet_trainer(tmp_path, max_steps=1).fit(module, data)
    assert [row["node"] for row in data.examples("train")] == ["the cat sat"]
    assert data.distilled([row["text"] for row in TEXTS]) == (ROWS, LOST)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    # Cut off before its end: the last item of a list is not whole, a solution is none.
    short = LearningNodeDistillation(TEXTS, **{**options, "generation": {"max_new_tokens": 12}})
    with pytest.raises(ValueError, match="none of 3 train texts gives a question"):
        quiet_trainer(tmp_path, max_steps=1).fit(module, short)


def test_requests_without_room_for_a_reply_are_left_out(taught, tmp_path):
    network, tokenizer = taught
    long = {"text": " ".join(["the cat sat on red"] * 60)}
    data = LearningNodeDistillation(
        [TEXTS[0], long], **REQUESTS, cache_dir=str(tmp_path), generation={"max_new_tokens": 60}
    )
    quiet_trainer(tmp_path, max_steps=1).fit(CausalLM(network, tokenizer=tokenizer, learning_rate=0.0), data)
    rows, lost = data.distilled([TEXTS[0]["text"], long["text"]])
    assert rows == ROWS
    assert lost["requests too long"] == 1


# -- refusals ----------------------------------------------------------------------------------------------------------


class Unnamed:
    def __call__(self, requests):
        return requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes_per_text": 0}, "nodes_per_text=0 must be at least 1"),
        ({"questions_per_node": 0}, "questions_per_node=0 must be at least 1"),
        ({"nodes_request": "list the nodes"}, r"nodes_request has the places \[\]: it needs \{text\}"),
        ({"questions_request": "{node} {page}"}, r"questions_request has the places \['node', 'page'\]"),
        ({"solution_request": "{text}"}, r"solution_request has the places \['text'\]: it needs \{question\}"),
        ({"generator": 7}, "generator=7 cannot be called"),
        ({"generator": Unnamed()}, "Unnamed cannot be told from others in the cache"),
        ({"generator": lambda requests: requests}, "cannot be told from others in the cache"),
        ({"generator": functools.partial(echo_list)}, "cannot be told from others in the cache"),
        ({"generator": "nowhere.teacher"}, "generator='nowhere.teacher' cannot be imported"),
        ({"generator": "builtins.list", "model": "a"}, "generator and model='a' are both to reply"),
        ({"streaming": True}, "streaming=True"),
    ],
)
def test_bad_arguments_name_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningNodeDistillation(TEXTS, **arguments)


def test_bad_replies_and_rows(tmp_path):
    with pytest.raises(ValueError, match="gave 2 replies to 1 requests"):
        data_of(tmp_path, "tests.datamodules.test_learning_nodes.twice").examples("train")
    with pytest.raises(ValueError, match=r"none of 3 train texts gives a question .*left out: 3 texts without nodes"):
        data_of(tmp_path, "builtins.list").examples("train")
    with pytest.raises(ValueError, match=r"columns \['prompt', 'completion'\]: give 'text'"):
        data_of(tmp_path, data=[{"prompt": "a", "completion": "b"}]).examples("train")
    with pytest.raises(ValueError, match="no network to answer"):
        LearningNodeDistillation(TEXTS, tokenizer=tiny_tokenizer(), cache_dir=str(tmp_path)).examples("train")


def twice(requests: list[str]) -> list[str]:
    """More replies than requests."""
    return requests * 2
