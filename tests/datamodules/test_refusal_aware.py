"""Sure of just what the network knew, in any order; average precision against scikit-learn."""

import copy
import math
import pickle

import datasets
import lightning.pytorch as L
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from lightning_peft.datamodules.answers import choice_ids, prompt_ids, score_choices
from lightning_peft.datamodules.collate import collate
from lightning_peft.datamodules.refusal_aware import (
    ASKED,
    REFUSALS,
    CertaintyAveragePrecision,
    RefusalAwareData,
    RefusalAwareTransform,
    WillingAccuracy,
    answer_entropy,
    certainty,
    certainty_ids,
    first_sentence,
    prompt_of,
)
from lightning_peft.datamodules.tokenized import tokenize_row
from lightning_peft.models import CausalLM
from tests.datamodules.subwords import subword_tokenizer
from tests.tiny import tiny_llama

TOPICS, ANSWERS = ("cat", "dog"), ("red", "green", "blue", "one", "two", "three")
FACTS = [
    {"prompt": f"{topic} number {n}", "completion": ANSWERS[(5 * n + 3 * (topic == "dog")) % 6]}
    for topic in TOPICS
    for n in range(12)
]
TEXTS = [f"{prompt_of(row['prompt'])} {row['completion']}. {ASKED} I am sure. I am unsure." for row in FACTS]
TOKENIZER = subword_tokenizer([*TEXTS, *REFUSALS], entries=420)


def network(**kwargs):
    return tiny_llama(vocab_size=len(TOKENIZER), **kwargs)


def learn(model, texts, steps, rate=1e-2):
    """Teaches facts as plain prompts and completions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    rows = [tokenize_row(row, TOKENIZER) for row in texts]
    batch = collate([{key: row[key] for key in ("input_ids", "labels")} for row in rows], 0)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def knowing():
    """A network that knows all facts about cats and none about dogs."""
    model = network()
    known = [
        {"prompt": prompt_of(r["prompt"]), "completion": f" {r['completion']}."} for r in FACTS if "cat" in r["prompt"]
    ]
    learn(model, known, 150)
    return model


class Stub(torch.nn.Module):
    """Knows a fixed set of answers, by question, and otherwise says something else."""

    def __init__(self, known, samples=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.generation_config = type("Config", (), {"eos_token_id": 4})()
        self.known, self.samples, self.asked = known, samples or {}, []

    def generate(self, input_ids, attention_mask, **options):
        said = []
        for ids, mask in zip(input_ids, attention_mask):
            question = TOKENIZER.decode(ids[mask.bool()]).removeprefix("Question: ").removesuffix(" Answer:")
            self.asked.append(question)
            texts = self.samples.get(question)
            text = texts[self.asked.count(question) - 1] if texts else self.known.get(question, "no idea")
            said.append(TOKENIZER(f" {text}. and more", add_special_tokens=False)["input_ids"])
        longest = max(map(len, said))
        return torch.cat([input_ids, torch.tensor([one + [4] * (longest - len(one)) for one in said])], 1)


def data(model, rows=FACTS, folder=None, **kwargs):
    made = RefusalAwareData(rows, **{"tokenizer": TOKENIZER, "cache_dir": str(folder), "batch_size": 4, **kwargs})
    made.model = model
    return made


def texts(made, split="train"):
    return [TOKENIZER.decode(row["input_ids"]) for row in made.rows(split)]


def learnt(row):
    """The learnt stretches of a row, as text."""
    out, before = [], -100
    for label in row["labels"]:
        if label != -100:
            out = out if before != -100 else [*out, []]
            out[-1].append(label)
        before = label
    return [TOKENIZER.decode(ids) for ids in out]


# -- the transform ------------------------------------------------------------------------------------------------

CAPITAL = {"prompt": "Capital of France?", "completion": "Paris"}


@pytest.mark.parametrize(("known", "word"), [(True, "sure"), (False, "unsure")])
@pytest.mark.parametrize("mode", ["unsure", "uncertain"])
def test_literal(mode, known, word):
    row = RefusalAwareTransform(TOKENIZER, mode)({**CAPITAL, "known": known})
    text = f"Question: Capital of France? Answer: Paris. {ASKED} I am {word}.<|im_end|>"
    assert TOKENIZER.decode(row["input_ids"]) == text
    assert learnt(row) == [" Paris.", f" I am {word}.<|im_end|>"]
    every = RefusalAwareTransform(TOKENIZER, mode, loss_on="all")({**CAPITAL, "known": known})
    assert every["labels"] == every["input_ids"] == row["input_ids"]


def test_unknown_replaces_the_answer_by_a_refusal():
    transform = RefusalAwareTransform(TOKENIZER, "unknown")
    kept = transform({**CAPITAL, "known": True})
    assert learnt(kept) == [" Paris.<|im_end|>"]
    (refused,) = learnt(transform({**CAPITAL, "known": False}))
    assert refused.removesuffix("<|im_end|>").strip() in REFUSALS
    assert learnt(transform({**CAPITAL, "known": False}, 3)) == [refused], "one way for a question, in every epoch"
    said = {learnt(transform({**row, "known": False}))[0] for row in FACTS}
    assert len(said) > 5
    assert len(set(REFUSALS)) == 16


def test_a_conversation_goes_on():
    row = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "Capital of France?"},
            {"role": "assistant", "content": "Paris."},
        ]
    }
    made = RefusalAwareTransform(TOKENIZER)({**row, "known": False})
    turns = [(turn["role"], turn["content"]) for turn in made["messages"]]
    assert turns == [
        ("system", "s"),
        ("user", "Capital of France?"),
        ("assistant", "Paris."),
        ("user", ASKED),
        ("assistant", "I am unsure."),
    ]
    given = {"prompt": row["messages"][:2], "completion": row["messages"][2:], "known": False}
    assert RefusalAwareTransform(TOKENIZER)(given)["messages"] == made["messages"]


def test_usable_with_map_alone():
    rows = datasets.Dataset.from_list([{**row, "known": n % 2 == 0} for n, row in enumerate(FACTS)])
    transform = pickle.loads(pickle.dumps(RefusalAwareTransform(TOKENIZER, "unknown")))
    assert rows.map(transform)["input_ids"] == [transform(row)["input_ids"] for row in rows]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (CAPITAL, "no column 'known'"),
        ({**CAPITAL, "completion": " . ", "known": True}, "empty answer"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}, "a row has 2"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(ValueError, match=message):
        RefusalAwareTransform(TOKENIZER)(row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "certain"}, "mode='certain' is not known"),
        ({"loss_on": "question"}, "loss_on='question' is not known"),
        ({"mode": "uncertain", "samples": 1}, "samples=1 must be at least 2"),
        ({"streaming": True}, "streaming=True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RefusalAwareData(FACTS, **arguments)


def test_answers_are_cut_at_the_first_period_and_kept_whole_without():
    assert first_sentence(" Paris. Or not") == "Paris"
    assert first_sentence(" Paris") == "Paris", "the published probe loses the last letter"
    assert first_sentence(" U.S. dollar. Yes", "U.S. dollar") == "U.S. dollar. Yes"
    assert first_sentence("") == ""


# -- the probe ----------------------------------------------------------------------------------------------------


def test_the_split_is_the_set_that_the_network_knows(tmp_path):
    known = {row["prompt"]: row["completion"] for row in FACTS[::3]}
    made = data(Stub(known), folder=tmp_path)
    for row, text in zip(FACTS, texts(made), strict=True):
        assert text.startswith(f"{prompt_of(row['prompt'])} {row['completion']}. {ASKED}")
        assert text.endswith(f"I am {'sure' if row['prompt'] in known else 'unsure'}.<|im_end|>")


def test_the_order_of_the_rows_changes_no_label(tmp_path):
    backwards = FACTS[::-1]
    samples = {row["prompt"]: [f"{n % (i % 5 + 1)}" for n in range(5)] for i, row in enumerate(FACTS)}
    for mode, stub in (("unsure", lambda: Stub({})), ("uncertain", lambda: Stub({}, samples))):
        one = data(stub(), mode=mode, folder=tmp_path / "one")
        other = data(stub(), rows=backwards, mode=mode, folder=tmp_path / "other")
        assert texts(one) == texts(other)[::-1]
    # And from a real network, sampled by a seed.
    model = network().eval()
    options = {"mode": "uncertain", "samples": 3, "generation": {"max_new_tokens": 2}}
    made = [data(model, rows=rows, folder=tmp_path / "real", **options) for rows in (FACTS, backwards)]
    assert texts(made[0]) == texts(made[1])[::-1]
    assert len(list((tmp_path / "real" / "refusal_aware").iterdir())) == 1, "both orders ask the same"


def test_the_lower_half_by_entropy_is_sure(tmp_path):
    rows = FACTS[:7]
    samples = {row["prompt"]: [str(min(n, i)) for n in range(5)] for i, row in enumerate(rows)}
    made = texts(data(Stub({}, samples), rows=rows, mode="uncertain", folder=tmp_path))
    # Entropies rise with the number of different answers, 1 to 5; three of seven are sure.
    assert ["unsure" not in text for text in made] == [True] * 3 + [False] * 4


def test_entropy():
    assert answer_entropy(["a"] * 5) == 0
    assert answer_entropy(list("abcde")) == pytest.approx(math.log(5))
    assert answer_entropy(list("aabbc")) == pytest.approx(-(0.8 * math.log(0.4) + 0.2 * math.log(0.2)))


def test_the_probe_goes_on_from_its_files(tmp_path):
    known = {row["prompt"]: row["completion"] for row in FACTS[::2]}
    whole = texts(data(Stub(known), folder=tmp_path, shard_size=4))
    folder = next((tmp_path / "refusal_aware").iterdir())
    shards = sorted(folder.glob("shard-*.parquet"))
    assert len(shards) == 6
    for shard in shards[4:]:
        shard.unlink()
    stub = Stub(known)
    assert texts(data(stub, folder=tmp_path, shard_size=4)) == whole
    assert len(stub.asked) == 8
    again = Stub(known)
    assert texts(data(again, folder=tmp_path, shard_size=4)) == whole
    assert not again.asked


def test_held_out_rows(tmp_path):
    known = {FACTS[0]["prompt"]: FACTS[0]["completion"]}
    made = data(Stub(known), folder=tmp_path, validation=FACTS[:2], test=FACTS[:2])
    assert ["unsure" in text for text in texts(made, "validation")] == [False, True]
    plain = [f"{row['prompt']}{row['completion']}<|im_end|>" for row in FACTS[:2]]
    assert texts(made, "test") == plain, "test rows stay questions with answers"


def test_choices_by_the_most_probable(tmp_path):
    model = network().eval()
    rows = [{**row, "choices": list(ANSWERS)} for row in FACTS]
    scores = []
    for row in rows:
        own = []
        for choice in ANSWERS:
            prompt = TOKENIZER(prompt_of(row["prompt"]))["input_ids"]
            whole = TOKENIZER(f"{prompt_of(row['prompt'])} {choice}")["input_ids"]
            assert whole[: len(prompt)] == prompt
            with torch.no_grad():
                log_p = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
            own.append(sum(float(log_p[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        scores.append(own)
    best = [ANSWERS[int(np.argmax(own))] for own in scores]
    made = texts(data(model, rows=rows, folder=tmp_path))
    assert ["unsure" not in text for text in made] == [b == row["completion"] for b, row in zip(best, rows)]
    # The same scores from batches padded on the left.
    asked = [choice_ids(TOKENIZER, prompt_of(row["prompt"]), [f" {c}" for c in ANSWERS]) for row in rows]
    for ids, row in zip(asked, rows):
        assert ids[0] == prompt_ids(TOKENIZER, prompt_of(row["prompt"]))
    ours = score_choices(model, [ids for ids, _ in asked], [choices for _, choices in asked], 7)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(scores), atol=1e-4, rtol=0)
    wrong = [{"prompt": "q", "completion": "red", "choices": ["one", "two"]}]
    with pytest.raises(ValueError, match=r"'red' is not among its choices \['one', 'two'\]"):
        data(model, rows=wrong, folder=tmp_path).rows("train")


def test_without_a_network():
    with pytest.raises(ValueError, match="RefusalAwareData has no network to answer"):
        RefusalAwareData(FACTS, tokenizer=TOKENIZER).setup("fit")


# -- evaluation ---------------------------------------------------------------------------------------------------


def test_certainty_equals_the_formulas(knowing):
    model = knowing.eval()
    questions = [row["prompt"] for row in FACTS]
    made = certainty(model, TOKENIZER, questions, batch_size=5)
    for question, one in zip(questions, made):
        ids, product, said = TOKENIZER(prompt_of(question))["input_ids"], 1.0, []
        for _ in range(5):
            with torch.no_grad():
                p = model(torch.tensor([ids + said]), use_cache=False).logits[0, -1].softmax(-1)
            token = int(p.argmax())
            if token == 4 or "." in TOKENIZER.decode([token]):
                break
            said, product = [*said, token], product * float(p.max())
        assert one["answer"] == TOKENIZER.decode(said).strip()
        assert one["confidence"] == pytest.approx(product ** (1 / len(said)) if said else 0.0, abs=1e-4)
        context = TOKENIZER(f"{prompt_of(question)} {one['answer']}. {ASKED} I am")["input_ids"]
        sure, unsure = (TOKENIZER(f" {word}", add_special_tokens=False)["input_ids"][0] for word in ("sure", "unsure"))
        assert sure != unsure
        with torch.no_grad():
            p = model(torch.tensor([context]), use_cache=False).logits[0, -1].softmax(-1)
        assert one["certainty"] == pytest.approx(float(p[sure] / (p[sure] + p[unsure])), abs=1e-4)


def test_an_empty_answer_has_no_confidence():
    model = network().eval()
    ends = torch.zeros(len(TOKENIZER)).index_fill(0, torch.tensor([4]), 10.0)
    model.lm_head.forward = lambda hidden: ends.expand(*hidden.shape[:-1], -1)
    for one in certainty(model, TOKENIZER, ["q", "r"]):
        assert (one["answer"], one["confidence"]) == ("", 0.0)
        assert one["certainty"] == pytest.approx(0.5)


def test_words_that_begin_alike_are_told_apart_where_they_differ():
    shared, (sure, other) = certainty_ids(TOKENIZER, "q", "a", ("xyzsure", "xyzblue"))
    assert sure != other
    assert len(sure) == len(other) == 1
    assert TOKENIZER.decode(shared).endswith("xyz")
    with pytest.raises(ValueError, match="as the beginning of"):
        certainty_ids(TOKENIZER, "q", "a", ("xq", "xqxq"))


def test_average_precision_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 200, generator=generator)
    second[:80] = first[:80] = first[:80].round(decimals=1)  # ties
    correct = torch.rand(200, generator=generator) < (first + second) / 2
    metric = CertaintyAveragePrecision()
    for begin in range(0, 200, 64):
        part = slice(begin, begin + 64)
        metric.update(first[part], second[part], correct[part])
    expected = average_precision_score(correct.numpy(), ((first + second) / 2).numpy())
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)
    best = CertaintyAveragePrecision()
    best.update(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([0.9, 0.7, 0.2]), torch.tensor([True, True, False]))
    assert best.compute() == 1


def test_willing_accuracy():
    metric = WillingAccuracy()
    metric.update(torch.tensor([0.9, 0.8, 0.2]), torch.tensor([True, False, True]))
    metric.update(torch.tensor([0.5]), torch.tensor([False]))
    assert {key: float(value) for key, value in metric.compute().items()} == {
        "willing_accuracy": 0.5,
        "refusal_rate": 0.5,
    }


# -- behaviour ----------------------------------------------------------------------------------------------------


def test_a_tuned_network_is_surer_of_what_it_knows(knowing, tmp_path):
    """Of twelve facts it knows and twelve it does not, eight each are learnt from; the others are asked."""
    held_out = [row for n, row in enumerate(FACTS) if n % 3 == 1]
    rows = [row for row in FACTS if row not in held_out]
    module = CausalLM(copy.deepcopy(knowing), tokenizer=TOKENIZER, learning_rate=1e-2, warmup_steps=20)
    made = RefusalAwareData(rows, batch_size=16, cache_dir=str(tmp_path))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=150,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, made)
    said = ["unsure" not in text for text in texts(made)]
    assert said == ["cat" in row["prompt"] for row in rows], "the probe finds what the network was taught"
    answers = certainty(module.model.eval(), TOKENIZER, [row["prompt"] for row in held_out])
    known = [one["certainty"] for one, row in zip(answers, held_out) if "cat" in row["prompt"]]
    unknown = [one["certainty"] for one, row in zip(answers, held_out) if "dog" in row["prompt"]]
    assert min(known) > max(unknown)
    assert sum(known) / len(known) > 0.5 > sum(unknown) / len(unknown)
