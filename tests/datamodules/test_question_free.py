"""Responses without their questions, to the token; kappa against scikit-learn."""

import pickle

import datasets
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.question_free import (
    QuestionFreeData,
    QuestionFreeTransform,
    ReasoningAdaptabilityKappa,
    is_long_reasoning,
    length_change,
)
from tests.datamodules.subwords import subword_tokenizer
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

#: As Qwen's, which has a system text of its own where there is none.
INJECTING = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|> system \n UNIQUE <|im_end|> \n {% endif %}" + CHAT_TEMPLATE
)
RESPONSE = "First a, then b. Wait, c. The answer is c."


def chat(question, response, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    return {"messages": [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": response}]}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("row", [chat("QUESTION", RESPONSE, "SYSTEM"), {"prompt": "QUESTION", "completion": RESPONSE}])
def test_nothing_but_the_response(row, bos):
    tokenizer = subword_tokenizer([RESPONSE], bos=bos)
    tokenizer.chat_template = INJECTING
    ids = tokenizer(RESPONSE, add_special_tokens=False)["input_ids"]
    data = QuestionFreeData([row], tokenizer=tokenizer)
    data.setup("fit")
    made = data.rows("train")[0]
    assert made["input_ids"].tolist() == [1] * bos + ids
    assert tokenizer.decode(made["input_ids"]) == ("<s>" if bos else "") + RESPONSE
    # Nothing predicts a row's first token.
    assert (made["labels"][1:] != -100).sum() == (len(ids) if bos else len(ids) - 1)
    ended = QuestionFreeTransform(tokenizer, add_eos=True)(row)
    assert ended["input_ids"] == [1] * bos + [*ids, 4]
    assert ended["labels"] == [-100] * bos + [*ids, 4]


def test_held_out_rows_keep_their_questions():
    tokenizer = tiny_tokenizer(INJECTING)
    rows = [chat("a b", "c d")]
    data = QuestionFreeData(rows, validation=rows, test=rows, tokenizer=tokenizer)
    for stage in ("fit", "test"):
        data.setup(stage)
    asked = "<|im_start|> system \n <unk> <|im_end|> \n <|im_start|> user \n a b <|im_end|> \n "
    for split in ("validation", "test"):
        text = tokenizer.decode(data.rows(split)[0]["input_ids"])
        assert text == asked + "<|im_start|> assistant \n c d <|im_end|> \n"
    assert tokenizer.decode(data.rows("train")[0]["input_ids"]) == "c d"


def test_usable_with_map_alone_and_packed():
    rows = datasets.Dataset.from_list([{**chat("q", "a b c"), "weight": 2.0}, {**chat("r", "d e"), "weight": 1.0}])
    transform = pickle.loads(pickle.dumps(QuestionFreeTransform(tiny_tokenizer())))
    made = rows.map(transform, remove_columns=rows.column_names)
    assert set(made.column_names) == {"input_ids", "labels", "weight", "rewritten"}
    data = QuestionFreeData(rows, tokenizer=tiny_tokenizer(), packing=True, max_length=16)
    data.setup("fit")
    (row,) = [data.rows("train")[i] for i in range(len(data.rows("train")))]
    assert tiny_tokenizer().decode(row["input_ids"]) == "a b c d e"
    assert row["document_ids"].tolist() == [0, 0, 0, 1, 1]
    assert (row["labels"] != -100).tolist() == [False, True, True, False, True], "no response predicts the next"
    # The transform alone, as an argument: the columns that stay beside the tokens are not looked at.
    again = InstructionData([chat("q", "a b c")], tokenizer=tiny_tokenizer(), transforms=[transform])
    again.setup("fit")
    assert tiny_tokenizer().decode(again.rows("train")[0]["input_ids"]) == "a b c"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant's turn"),
        (chat("q", " "), "response is empty"),
        ({"messages": chat("q", "a")["messages"] * 2}, "a row has 2 responses"),
        ({"text": "a"}, "give 'messages'"),
    ],
)
def test_rows_without_one_response(row, message):
    with pytest.raises(ValueError, match=message):
        QuestionFreeData([row], tokenizer=tiny_tokenizer()).setup("fit")


# -- metrics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 16])
def test_kappa_is_that_of_scikit_learn(samples):
    generator = torch.Generator().manual_seed(0)
    solvable = torch.rand(40, generator=generator) < 0.6
    short = torch.rand(40, samples, generator=generator) < torch.where(solvable, 0.8, 0.3)[:, None]
    responses = [["So 4." if one else "So 4. Wait." for one in own] for own in short.tolist()]
    metric = ReasoningAdaptabilityKappa(samples)
    metric.update(solvable[:13], responses[:13])
    metric.update(solvable[13:], responses[13:])
    expected = [cohen_kappa_score(solvable.numpy(), short[:, i].numpy()) for i in range(samples)]
    assert float(metric.compute()) == pytest.approx(sum(expected) / samples, abs=1e-12)


def test_kappa_at_its_ends():
    metric = ReasoningAdaptabilityKappa()
    metric.update(torch.tensor([True, False]), [["short"], ["but wait"]])
    assert metric.compute() == 1
    metric.reset()
    metric.update(torch.tensor([True, False]), [["wait"], ["short"]])
    assert metric.compute() == -1
    own = ReasoningAdaptabilityKappa(is_long=lambda response: len(response) > 3)
    own.update(torch.tensor([True, False]), [["abc"], ["abcd"]])
    assert own.compute() == 1
    with pytest.raises(ValueError, match="samples=2 of them"):
        ReasoningAdaptabilityKappa(2).update(torch.tensor([True]), [["a"]])
    with pytest.raises(ValueError, match="samples=0"):
        ReasoningAdaptabilityKappa(0)
    pickle.dumps(ReasoningAdaptabilityKappa())


def test_long_reasoning_by_whole_words():
    assert is_long_reasoning("WAIT, that is wrong")
    assert not is_long_reasoning("the waiter awaits")
    assert is_long_reasoning("Hmm, however", ("hmm", "alternatively"))


def test_length_change_in_both_ways():
    before, after = {"easy": 1000.0, "hard": 9000.0}, {"easy": 250.0, "hard": 8100.0}
    made = length_change(before, after)
    assert made["mean_of_changes"] == pytest.approx((-0.75 - 0.1) / 2)
    assert made["change_of_means"] == pytest.approx(8350 / 10000 - 1)
    with pytest.raises(ValueError, match="the tasks before"):
        length_change({"a": 1}, {"b": 1})
