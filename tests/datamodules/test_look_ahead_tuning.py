"""Previews to the letter, cut out of the answer's own text; first tokens that start likelier and move less."""

import copy
import pickle
import random

import datasets
import pytest
import torch
from torch.nn import functional as F

from lightning_peft.datamodules.collate import collate
from lightning_peft.datamodules.look_ahead_tuning import (
    FirstTokensShift,
    LookAheadTransform,
    LookAheadTuningData,
    RefusalRate,
    preview,
)
from lightning_peft.datamodules.tokenized import tokenize_row
from tests.datamodules.subwords import subword_tokenizer
from tests.tiny import tiny_llama, tiny_tokenizer

BYTES = subword_tokenizer(["the answer is long and the answer is short"] * 3, entries=280)


class Slow:
    """A tokenizer that cannot tell which characters a token holds."""

    is_fast = False

    def __init__(self, inner):
        self.inner, self.decode = inner, inner.decode

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def contents(row):
    return [turn["content"] for turn in row["messages"]]


def test_real_previews_the_first_tokens():
    made = LookAheadTransform(tiny_tokenizer(), preview_tokens=3)(chat("one two", "a b c d e"))
    assert contents(made) == ["one two The answer begins with: a b c", "a b c d e"]
    assert made["rewritten"] == ["LookAheadTransform"]


def test_virtual_previews_a_prefix_that_the_answer_begins_with():
    made = LookAheadTransform(mode="virtual")(chat("one two", "a b"))
    prefix = "Let's solve this problem. "
    assert contents(made) == [f"one two The answer begins with: {prefix}", f"{prefix}a b"]
    # The published README's prefix begins with a blank, the connector ends with one: only one stands between.
    made = LookAheadTransform(mode="virtual", prefix=" Let's see. ")(chat("one", "a"))
    assert contents(made)[0] == "one The answer begins with: Let's see. "
    made = LookAheadTransform(mode="virtual", prefix="P", connector="|")(chat("one", " a"))
    assert contents(made) == ["one|P", " Pa"]


def test_every_answer_of_a_conversation_is_previewed_where_it_is_asked_for():
    row = {
        "messages": [{"role": "system", "content": "s"}, *chat("q", "a b")["messages"], *chat("r", "c d")["messages"]]
    }
    made = LookAheadTransform(tiny_tokenizer(), preview_tokens=1, connector=" > ")(row)
    assert contents(made) == ["s", "q > a", "a b", "r > c", "c d"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "one two\n", "completion": "a b c"}, "one two > a b\n"),
        ({"prompt": "one two:", "completion": " a b c"}, "one two: > a b"),
        ({"prompt": "one two", "completion": "a b c"}, "one two > a b\n"),
    ],
)
def test_plain_text_keeps_what_stands_between_question_and_answer(row, prompt):
    made = LookAheadTransform(tiny_tokenizer(), preview_tokens=2, connector=" > ")(row)
    assert (made["prompt"], made["completion"]) == (prompt, row["completion"])


def test_an_answer_shorter_than_the_preview_is_shown_whole():
    assert contents(LookAheadTransform(tiny_tokenizer(), connector=":")(chat("q", "a b")))[0] == "q:a b"


@pytest.mark.parametrize(
    "answer", ["é🙂ü the answer", "日本語です", "a\u0301🙂🙂", "  the answer is long", "tab\tand\nline"]
)
def test_a_preview_is_a_beginning_of_the_answer_in_whole_characters(answer):
    ids = BYTES(answer, add_special_tokens=False)["input_ids"]
    for tokens in range(1, len(ids) + 2):
        shown = preview(BYTES, answer, tokens)
        assert answer.startswith(shown)
        # The longest beginning that the tokens hold: none of its characters is half there.
        held = BYTES.decode(ids[:tokens])
        assert shown == held.rstrip("\ufffd") == preview(Slow(BYTES), answer, tokens)
    assert any("\ufffd" in BYTES.decode(ids[:n]) for n in range(len(ids))) == (not answer.isascii())


def test_usable_with_map_alone_and_picklable():
    rows = datasets.Dataset.from_list([chat("q", "a b c"), chat("r", "d e f")])
    transform = pickle.loads(pickle.dumps(LookAheadTransform(tiny_tokenizer(), preview_tokens=1, connector=" > ")))
    assert [contents(row) for row in rows.map(transform)] == [["q > a", "a b c"], ["r > d", "d e f"]]


def test_training_rows_only():
    rows = [{"prompt": f"{word} ", "completion": "x y z"} for word in "abcd"]
    data = LookAheadTuningData(
        rows, validation=rows, test=rows, tokenizer=tiny_tokenizer(), connector=" > ", preview_tokens=1
    )
    for stage in ("fit", "test"):
        data.setup(stage)
    decode = tiny_tokenizer().decode
    assert decode(data.rows("train")[0]["input_ids"]) == "a <unk> x x y z <|im_end|>"
    learnt = data.rows("train")[0]["labels"]
    assert decode(learnt[learnt != -100]) == "x y z <|im_end|>", "the whole answer is learnt, the preview is not"
    for split in ("validation", "test"):
        assert [decode(row["input_ids"]) for row in data.rows(split)] == [f"{w} x y z <|im_end|>" for w in "abcd"]


def test_applied_twice():
    transform = LookAheadTransform(tiny_tokenizer())
    with pytest.raises(ValueError, match="LookAheadTransform is applied twice"):
        transform(transform(chat("q", "a b")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "unreal"}, "mode='unreal' is not known: use 'real' or 'virtual'"),
        ({"preview_tokens": 0}, "preview_tokens=0 must be at least 1"),
        ({"mode": "virtual", "prefix": " "}, "prefix=' ' must have text"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LookAheadTuningData([chat("q", "a")], **arguments)


def test_bad_rows():
    with pytest.raises(ValueError, match="answer is empty"):
        LookAheadTransform(tiny_tokenizer())(chat("q", " "))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        LookAheadTransform()


# -- metrics ------------------------------------------------------------------------------------------------------


def test_shift_is_the_divergence_at_each_of_the_first_positions():
    generator = torch.Generator().manual_seed(0)
    tuned, base = torch.randn(2, 3, 7, 11, generator=generator)
    labels = torch.tensor([[-100, -100, 1, 2, 3, 4, -100], [-100, 1, 2, -100, -100, -100, -100], [-100] * 7])
    metric = FirstTokensShift(positions=3)
    metric.update(tuned[:1], base[:1], labels[:1])
    metric.update(tuned[1:], base[1:], labels[1:])
    # Labels are not shifted: the first of row 0 is predicted at place 1.
    found = {0: [(0, 1), (1, 0)], 1: [(0, 2), (1, 1)], 2: [(0, 3)]}
    expected = [
        torch.stack(
            [F.kl_div(base[i].double().log_softmax(-1), tuned[i].double().softmax(-1), reduction="sum") for i in places]
        ).mean()
        for places in found.values()
    ]
    torch.testing.assert_close(metric.by_position(), torch.stack(expected))
    torch.testing.assert_close(metric.compute(), (2 * expected[0] + 2 * expected[1] + expected[2]) / 5)
    same = FirstTokensShift()
    same.update(tuned, tuned, labels)
    assert same.compute() == 0
    with pytest.raises(ValueError, match="positions=0"):
        FirstTokensShift(0)


def test_refusal_rate():
    metric = RefusalRate()
    metric.update(["I'm sorry, but no.", "Sure, here it is."])
    metric.update(["Well. I cannot do that."])
    assert metric.compute() == pytest.approx(2 / 3)
    own = RefusalRate(["never"])
    own.update(["I cannot", "never"])
    assert own.compute() == 0.5


# -- behaviour ----------------------------------------------------------------------------------------------------

PREVIEW = 3


@pytest.fixture(scope="module")
def copying():
    """A network that has learnt to go on as it was told to begin, and what asks it so."""
    words, draws = [f"w{i}" for i in range(40)], random.Random(0)
    tokenizer = tiny_tokenizer(None)
    look = LookAheadTransform(tokenizer, preview_tokens=PREVIEW, connector=" answer ")

    def row():
        return {"prompt": " ".join(draws.sample(words, 2)) + " \n ", "completion": " ".join(draws.sample(words, 6))}

    def batch(rows):
        made = [tokenize_row(row, tokenizer) for row in rows]
        return collate([{key: one[key] for key in ("input_ids", "labels")} for one in made], 0)

    network = tiny_llama()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.9, 0.98))
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 10)
        rows = [row() for _ in range(32)]
        network(**batch([look(one) if i % 8 else one for i, one in enumerate(rows)])).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    task = [row() for _ in range(16)]
    return network.eval(), batch(task), batch([look(one) for one in task])


def nll(network, batch):
    with torch.no_grad():
        logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return [own[target != -100] for own, target in zip(each, labels)]


def test_the_first_tokens_start_likelier(copying):
    network, vanilla, ahead = copying
    plain, shown = (torch.stack([own[:PREVIEW] for own in nll(network, batch)]).mean() for batch in (vanilla, ahead))
    assert shown < 0.1 < 3 < plain


def test_the_first_tokens_move_less_at_equal_loss(copying):
    """Both are tuned until the mean loss of what they learn, the whole answer, has fallen to 0.7."""
    base, vanilla, ahead = copying
    shifts = []
    for learnt in (vanilla, ahead):
        network = copy.deepcopy(base)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        for _ in range(200):
            if torch.cat(nll(network, learnt)).mean() <= 0.7:
                break
            network(**learnt).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            pytest.fail("the loss did not fall")
        metric = FirstTokensShift(PREVIEW)
        inputs = {key: vanilla[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            metric.update(network(**inputs).logits, base(**inputs).logits, vanilla["labels"])
        shifts.append(float(metric.compute()))
    assert shifts[1] < 0.7 * shifts[0], shifts
