"""Short versions that keep answer and order, both versions on one side, exact ratios; lengths between the two."""

import pickle
from collections import Counter

import datasets
import pytest
import torch

from lightning_peft.datamodules.collate import collate
from lightning_peft.datamodules.long_short_mixture import (
    MODES,
    ChainVersionTransform,
    LongShortMixtureData,
    ReasoningEfficiency,
    final_answer,
    mixture,
    split_chain,
    steps,
    why_rejected,
)
from lightning_peft.datamodules.tokenized import tokenize_row
from tests.tiny import tiny_llama, tiny_tokenizer

LONG = "First 2 + 3 = 5. Hmm, 2 + 3 = 5 again. Wait, now 5 * 4 = 20, and then 20 - 1 = 19. So it is 19."
SHORT = "2 + 3 = 5, 5 * 4 = 20, 20 - 1 = 19."


def chat(question, chain=LONG, answer="19", **columns):
    response = f"<think>\n{chain}\n</think>\n{answer}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return {"messages": turns, **columns}


def contents(row):
    return [turn["content"] for turn in row["messages"]]


# -- checks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("short", "reason"),
    [
        (SHORT, None),
        ("5 * 4 = 20, 20 - 1 = 19", None),
        ("So 19.", None),
        ("", "empty"),
        (" \n", "empty"),
        (LONG, "longer"),
        ("2 + 3 = 5, 5 * 4 = 20, 20 - 1 = 18.", "answer"),
        ("The answer is 20.", "answer"),
        ("5 * 4 = 20, 2 + 3 = 5, 20 - 1 = 19.", "order"),
    ],
)
def test_a_short_version_keeps_the_answer_and_the_order(short, reason):
    assert why_rejected(LONG, short, "19") == reason


def test_answers_that_are_no_numbers():
    chain = "The river is the Seine, which runs through Paris. Again, the Seine is in Paris, I think."
    assert why_rejected(chain, "The Seine runs through Paris.", "Paris") is None
    assert why_rejected(chain, "The Seine runs through Lyon.", "Paris") == "answer"
    assert (
        why_rejected(r"it is 1/2 so \boxed{\frac{1}{2}} after all", r"so \boxed{\frac{1}{2}}", r"\boxed{\frac{1}{2}}")
        is None
    )
    assert (
        why_rejected(r"it is 1/2 so \boxed{\frac{1}{2}} after all", r"so \boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}")
        == "answer"
    )


def test_final_answers_and_steps():
    assert final_answer(r"\boxed{ 3 x } of 7") == "3x"
    assert final_answer("1,200 in all.") == "1200"
    assert final_answer("-4") == "-4"
    assert steps(LONG) == ["2+3=5", "2+3=5", "5*4=20", "20-1=19"]
    assert steps("so x = 3 and (a + b) * 2 = 8") == ["x=3", "(a+b)*2=8"]
    assert steps("3 apples and 1,200 pears") == ["3", "1200"]


# -- versions -----------------------------------------------------------------------------------------------------


def test_literal():
    row = chat("How much?", short=SHORT)
    long, short, balanced = (ChainVersionTransform(version)(row) for version in ("long", "short", "balanced"))
    asked = "Answer the problem with a detailed thinking process:\n\nHow much?"
    assert contents(long) == [asked, f"<think>\n{LONG}\n</think>\n19"]
    asked = "Answer the problem with a brief thinking process:\n\nHow much?"
    assert contents(short) == [asked, f"<think>\n{SHORT}\n</think>\n19"]
    assert contents(balanced) == [MODES["balanced"] + "How much?", f"<think>\n{LONG}\n</think>\n19"]
    plain = ChainVersionTransform("short", mode_instruction=False)(row)
    assert contents(plain) == ["How much?", f"<think>\n{SHORT}\n</think>\n19"]
    own = ChainVersionTransform("short", think_marks=("[", "]"))(
        {"prompt": "q ", "completion": "[a b] c", "short": "a"}
    )
    assert (own["prompt"], own["completion"]) == (MODES["short"] + "q ", "[a] c")
    with pytest.raises(ValueError, match="ChainVersionTransform is applied twice"):
        ChainVersionTransform("long")(long)


def test_usable_with_map_alone():
    rows = datasets.Dataset.from_list([chat(f"q{n}", short=SHORT) for n in range(4)])
    transform = pickle.loads(pickle.dumps(ChainVersionTransform("short")))
    assert [contents(row) for row in rows.map(transform)] == [contents(transform(row)) for row in rows]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChainVersionTransform("medium"), "version='medium' is not known"),
        (lambda: ChainVersionTransform("short")(chat("q")), "no short chain in its column 'short'"),
        (lambda: ChainVersionTransform("long")({"prompt": "q", "completion": "19"}), "no chain between '<think>'"),
        (lambda: split_chain("<think>a</think> "), "with an answer behind"),
        (
            lambda: ChainVersionTransform("long")({"messages": chat("q")["messages"] * 2}),
            "a row has 2 responses",
        ),
    ],
)
def test_bad_rows(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- the mixture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "counts"),
    [(None, (10, 8)), (0.5, (10, 5)), (0.8, (10, 8)), (1, (8, 8)), (2, (4, 8)), (0.1, (10, 1)), (8, (1, 8))],
)
def test_ratios_are_exact(ratio, counts):
    long, short = mixture(list(range(10)), list(range(8)), ratio, seed=3)
    assert (len(long), len(short)) == counts
    assert len(set(long)) == len(long)
    assert len(set(short)) == len(short)
    assert mixture(list(range(10)), list(range(8)), ratio, seed=3) == (long, short)


def test_ratios_that_cannot_be_met():
    for ratio in (9, 0.01):
        with pytest.raises(ValueError, match=f"ratio={ratio} cannot be met"):
            mixture(list(range(10)), list(range(8)), ratio)
    with pytest.raises(ValueError, match="ratio=0 must be above 0"):
        LongShortMixtureData([chat("q")], ratio=0)


ROWS = [chat(f"question {n}", short=SHORT if n % 5 else "wrong 7") for n in range(10)]


def data(rows=ROWS, **kwargs):
    made = LongShortMixtureData(rows, **{"tokenizer": tiny_tokenizer(), "max_length": 512, "batch_size": 4, **kwargs})
    return made


def versions(made, split="train"):
    rows = made.examples(split)
    return [
        (question.split("\n\n")[0] + "\n\n", question.split("\n\n")[1], SHORT in answer)
        for question, answer in map(contents, rows)
    ]


def test_the_union_leaves_out_the_short_row_only():
    made = Counter(version for version, _, _ in versions(data()))
    assert made == {MODES["long"]: 10, MODES["short"]: 8}
    rejected = {"question 0", "question 5"}
    assert {question for version, question, _ in versions(data()) if version == MODES["short"]} == {
        f"question {n}" for n in range(10)
    } - rejected
    assert all(short == (version == MODES["short"]) for version, _, short in versions(data()))
    assert versions(data(seed=4)) == versions(data(seed=4))
    some = versions(data(ratio=0.5))
    assert Counter(version for version, _, _ in some) == {MODES["long"]: 10, MODES["short"]: 5}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_versions_of_a_question_lie_on_one_side(seed):
    made = data(validation=0.3, test=0.2, seed=seed)
    sides = {split: {question for _, question, _ in versions(made, split)} for split in ("train", "validation", "test")}
    assert [len(side) for side in sides.values()] == [5, 3, 2]
    assert len(set.union(*sides.values())) == 10
    assert {version for version, _, _ in versions(made, "test")} == {MODES["balanced"]}


def test_questions_on_two_sides():
    twice = [chat("Question  3", short=SHORT)]
    with pytest.raises(ValueError, match="1 questions stand in both the train and the validation split"):
        data(validation=twice).setup("fit")
    with pytest.raises(ValueError, match="1 questions stand in both the validation and the test split"):
        data(rows=[chat("other", short=SHORT)], validation=twice, test=twice).setup("fit")


def test_order_is_that_of_the_seed():
    def order(**kwargs):
        made = data(**kwargs)
        made.setup("fit")
        return [batch["input_ids"].tolist() for batch in made.train_dataloader()]

    assert order(seed=1) == order(seed=1) != order(seed=2)


class Rewriter(torch.nn.Module):
    """Says a fixed text to every request."""

    def __init__(self, text, finished=True, room=100_000):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.generation_config = type("Config", (), {"eos_token_id": 4})()
        self.config = type("Config", (), {"max_position_embeddings": room})()
        self.text, self.finished, self.asked = text, finished, 0

    def generate(self, input_ids, attention_mask, **options):
        self.asked += len(input_ids)
        ids = tiny_tokenizer()(self.text, add_special_tokens=False)["input_ids"] + [4] * self.finished
        return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], 1)


def rewritten(rewriter, folder, rows=None, **kwargs):
    rows = rows or [chat(f"q w{n}", "a b c d e yes a b c d e yes", "yes") for n in range(5)]
    made = data(rows=rows, cache_dir=str(folder), generation={"max_new_tokens": 20}, **kwargs)
    made.model = rewriter
    return made


def test_a_network_rewrites_once(tmp_path):
    rewriter = Rewriter("a b yes")
    made = rewritten(rewriter, tmp_path).examples("train")
    answers = [contents(row)[1] for row in made]
    assert answers[5:] == ["<think>\na b yes\n</think>\nyes"] * 5
    again = Rewriter("a b yes")
    assert [contents(row) for row in rewritten(again, tmp_path).examples("train")] == [contents(row) for row in made]
    assert (rewriter.asked, again.asked) == (5, 0)
    # Only rows that have no short version are asked for one.
    rows = [{**chat(f"q w{n}", "a b c d e yes a b c yes", "yes"), "short": "c yes" if n else None} for n in range(3)]
    mixed = Rewriter("a b yes")
    made = rewritten(mixed, tmp_path, rows=rows).examples("train")
    assert [contents(row)[1].split("\n")[1] for row in made][3:] == ["a b yes", "c yes", "c yes"]
    assert mixed.asked == 1


@pytest.mark.parametrize(
    ("rewriter", "reason"),
    [
        (Rewriter("a b no"), "5 answer"),
        (Rewriter("a b yes", finished=False), "5 empty"),
        (Rewriter("a b yes " * 9), "5 longer"),
        (Rewriter("a b yes", room=30), "5 empty"),
    ],
)
def test_a_rewriter_that_fails(rewriter, reason, tmp_path):
    with pytest.raises(ValueError, match=rf"none of 5 short versions of the train chains passes \({reason}\)"):
        rewritten(rewriter, tmp_path).examples("train")


def test_without_a_network():
    with pytest.raises(ValueError, match="LongShortMixtureData has no network to answer"):
        data(rows=[chat("q")]).examples("train")


def test_efficiency():
    metric = ReasoningEfficiency()
    metric.update(torch.tensor([100, 300]), torch.tensor([True, False]))
    metric.update(torch.tensor([500]), torch.tensor([True]))
    made = {name: float(value) for name, value in metric.compute().items()}
    assert made["mean_length"] == 300
    assert made["accuracy"] == pytest.approx(2 / 3)
    assert made["accuracy_per_1000_tokens"] == pytest.approx(1000 * 2 / 3 / 300)


# -- behaviour ----------------------------------------------------------------------------------------------------

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def test_lengths_lie_between_long_and_short():
    """Sums by counting on: the long chain counts twice, the short one once; answers are sampled."""
    tokenizer = tiny_tokenizer(None)
    rows = [
        {
            "prompt": f"{NUMBERS[i]} {NUMBERS[j]} ",
            "completion": f"<think> {' '.join(NUMBERS[i : i + j + 2] * 2)} </think> {NUMBERS[i + j + 1]}",
            "short": f"{NUMBERS[i + j + 1]}",
        }
        for i in range(4)
        for j in range(4)
    ]
    made = LongShortMixtureData(rows, mode_instruction=False, tokenizer=tokenizer).examples("train")
    assert len(made) == 32
    found = {}
    for name, part in {"long": range(16), "short": range(16, 32), "mixture": range(32)}.items():
        batch = [tokenize_row(made[i], tokenizer) for i in part]
        batch = collate([{key: row[key] for key in ("input_ids", "labels")} for row in batch], 0)
        network = tiny_llama()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 10) * (1 - step / 200)
            network(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt")["input_ids"]
        torch.manual_seed(0)
        with torch.no_grad():
            said = network.eval().generate(
                prompts,
                do_sample=True,
                temperature=0.7,
                max_new_tokens=30,
                num_return_sequences=4,
                pad_token_id=0,
                eos_token_id=4,
            )[:, prompts.shape[1] :]
        lengths = (said != 0).sum(1)
        right = [row["completion"].split()[-1] for row in rows for _ in range(4)]
        correct = [
            text.removesuffix(" <|im_end|>").split()[-1] == answer
            for text, answer in zip((tokenizer.decode(ids[ids != 0]) for ids in said), right)
        ]
        metric = ReasoningEfficiency()
        metric.update(lengths, torch.tensor(correct))
        found[name] = {key: float(value) for key, value in metric.compute().items()}
    assert found["short"]["mean_length"] < found["mixture"]["mean_length"] < found["long"]["mean_length"], found
    assert found["mixture"]["accuracy"] >= found["short"]["accuracy"], found
