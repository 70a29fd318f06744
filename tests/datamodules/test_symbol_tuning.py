"""Symbols apart, prompts to the letter, nothing of the labels leaks; a tuned network follows flipped labels."""

import copy
import pickle
import random
import re
from collections import Counter

import datasets
import pytest
import torch

from lightning_peft.datamodules.collate import collate
from lightning_peft.datamodules.symbol_tuning import (
    EVALUATION,
    LAYOUTS,
    SETTINGS,
    TRAINING,
    InContextAccuracy,
    SymbolTuningData,
    SymbolTuningTransform,
    SymbolVocabulary,
    chosen_labels,
    letters,
)
from tests.datamodules.subwords import subword_tokenizer
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = subword_tokenizer(["Input: text 12 Output: positive negative", "A B AA word"] * 2, entries=300)
TOPICS = {"mood": ("POSITIVE", "NEGATIVE"), "topic": ("SPORT", "TRADE", "TRAVEL")}
ROWS = [
    {"input": f"{task} {label.lower()} text {n}", "label": label, "task": task, "instruction": f"Which {task}?"}
    for task, labels in TOPICS.items()
    for label in labels
    for n in range(12)
]


def transform(**kwargs):
    return SymbolTuningTransform(ROWS, TOKENIZER, **{"seed": 1, **kwargs})


# -- symbols ------------------------------------------------------------------------------------------------------


def test_symbols_of_training_and_evaluation_are_disjoint():
    vocabulary = SymbolVocabulary()
    training = {*map(str, range(TRAINING)), *map(letters, range(TRAINING)), *vocabulary.words[False]}
    others = range(TRAINING, EVALUATION)
    evaluation = {*map(str, others), *map(letters, others), *vocabulary.words[True]}
    assert (len(training), len(evaluation)) == (30_000, 270_000), "no symbol is of two kinds"
    assert not training & evaluation
    assert (vocabulary.size(), vocabulary.size(evaluation=True)) == (30_000, 270_000)
    assert all(word.isalpha() and word.islower() for word in training if not word.isupper() and not word.isdigit())
    draws = random.Random(0)
    for evaluating, symbols in ((False, training), (True, evaluation)):
        drawn = [vocabulary.symbol(draws, evaluating) for _ in range(3000)]
        assert set(drawn) <= symbols
        kinds = Counter("integers" if s.isdigit() else "letters" if s.isupper() else "words" for s in drawn)
        assert sum((n - 1000) ** 2 / 1000 for n in kinds.values()) < 9.21  # chi-square, 2 degrees of freedom, 1%


def test_letters_count_in_base_26_without_a_zero():
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert [letters(n) for n in range(26)] == list(alphabet)
    assert [letters(n) for n in range(26, 26 + 26**2)] == [a + b for a in alphabet for b in alphabet]
    assert letters(9_999) == "NTP"


def test_no_symbol_of_a_prompt_begins_another():
    vocabulary = SymbolVocabulary(["integers", "letters"])
    for number in range(200):
        drawn = vocabulary.draw(8, random.Random(number))
        assert not any(a.startswith(b) for a in drawn for b in drawn if a is not b)
    made = transform()
    for row in ROWS[::5]:
        for epoch in range(5):
            tokens = [TOKENIZER(choice)["input_ids"] for choice in made.prompt(row, epoch).choices]
            assert not any(a[: len(b)] == b for a in tokens for b in tokens if a is not b)
    with pytest.raises(ValueError, match="there are not 3 symbols of 2 none of which begins another"):
        SymbolVocabulary(["words"], ["a", "b"], ["c"]).draw(3, random.Random(0))
    # Every symbol is unknown to this tokenizer, so all are one to it.
    with pytest.raises(ValueError, match="there are not 3 symbols of 30000"):
        SymbolTuningTransform(ROWS, tiny_tokenizer())


def test_words_of_ones_own():
    vocabulary = SymbolVocabulary(["words"], ["cat", "dog"], ["dog", "red"])
    assert vocabulary.words == {False: ["cat", "dog"], True: ["red"]}
    for arguments, message in (
        ({"kinds": ["signs"]}, r"kinds=\['signs'\] must be some of"),
        ({"kinds": []}, r"kinds=\[\] must be"),
        ({"words": ["a"], "evaluation_words": ["a"]}, "1 words and 0 others"),
    ):
        with pytest.raises(ValueError, match=message):
            SymbolVocabulary(**arguments)


# -- prompts ------------------------------------------------------------------------------------------------------


def test_literal():
    rows = [{"input": text, "label": label} for text, label in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "y"))]
    vocabulary = SymbolVocabulary(["words"], ["red", "blue"], ["green"])
    tokenizer = tiny_tokenizer()
    made = SymbolTuningTransform(rows, tokenizer, per_class=(1, 1), vocabulary=vocabulary, layouts=[("one ", " two")])
    shown = made.prompt(rows[0])
    x, y = shown.choices
    assert {x, y} == {" red", " blue"}
    assert shown.answer == 0
    c_or_d = "c" if "c" in shown.prompt else "d"
    exemplars = [f"one b two{x}", f"one {c_or_d} two{y}"]
    assert shown.prompt in ("\n\n".join([*exemplars, "one a two"]), "\n\n".join([*exemplars[::-1], "one a two"]))
    row = made(rows[0])
    assert tokenizer.decode(row["input_ids"]) == shown.prompt.replace("\n\n", " \n \n ") + x
    assert row["labels"] == [-100] * (len(row["input_ids"]) - 1) + tokenizer(x)["input_ids"], "the symbol alone"
    ended = SymbolTuningTransform(rows, tokenizer, per_class=(1, 1), vocabulary=vocabulary, end_of_text=True)(rows[0])
    assert tokenizer.decode(ended["labels"][-2:]) == f"{x.strip()} <|im_end|>"


def parsed(prompt):
    """The layout, the exemplars as (input, symbol), and the query."""
    *exemplars, query = prompt.split("\n\n")
    before, between = next(
        (before, between)
        for before, between in sorted(LAYOUTS, key=lambda one: -len(one[0]))
        if query.startswith(before) and query.endswith(between)
    )
    pairs = [one.removeprefix(before).rsplit(between, 1) for one in exemplars]
    return (
        (before, between),
        [(text, symbol) for text, symbol in pairs],
        query.removeprefix(before).removesuffix(between),
    )


def test_a_prompt_shows_every_class_equally_often_and_never_its_query():
    made = transform()
    counts, layouts = Counter(), Counter()
    for epoch in range(4):
        for row in ROWS:
            shown = made.prompt(row, epoch)
            layout, exemplars, query = parsed(shown.prompt)
            assert query == row["input"]
            assert query not in [text for text, _ in exemplars]
            by_symbol = Counter(symbol for _, symbol in exemplars)
            assert set(by_symbol) == set(shown.choices), "every class is among the exemplars"
            assert len(set(by_symbol.values())) == 1
            for text, symbol in exemplars:
                label = next(r["label"] for r in ROWS if r["input"] == text)
                assert text.startswith(row["task"])
                assert symbol == shown.choices[sorted(TOPICS[row["task"]]).index(label)]
            assert shown.choices[shown.answer] == shown.choices[sorted(TOPICS[row["task"]]).index(row["label"])]
            counts[next(iter(by_symbol.values()))] += 1
            layouts[layout] += 1
    assert set(counts) == set(range(2, 11))
    n = sum(counts.values())
    assert sum((c - n / 9) ** 2 / (n / 9) for c in counts.values()) < 20.1  # 8 degrees of freedom, 1%
    assert set(layouts) == set(LAYOUTS)


def test_no_label_leaks():
    made = transform()
    for row in ROWS:
        text = TOKENIZER.decode(made(row, 3)["input_ids"])
        assert not re.search("|".join(label for labels in TOPICS.values() for label in labels), text)
        assert "Which" not in text


def test_a_class_has_every_symbol_equally_often():
    vocabulary = SymbolVocabulary(["words"], ["red", "blue", "green", "cat"], ["dog"])
    made = transform(vocabulary=vocabulary)
    row = next(row for row in ROWS if row["task"] == "topic")
    drawn = Counter()
    for epoch in range(800):
        shown = made.prompt(row, epoch)
        drawn[shown.choices[shown.answer]] += 1
    assert set(drawn) == {" red", " blue", " green", " cat"}
    assert sum((n - 200) ** 2 / 200 for n in drawn.values()) < 11.3  # 3 degrees of freedom, 1%


def test_permuting_the_classes_permutes_the_target():
    """Flipped labels are the relevant ones of the next class, on the same exemplars in the same order."""
    relevant, flipped = transform(labels="relevant"), transform(labels="flipped")
    for row in ROWS[::3]:
        classes = sorted(TOPICS[row["task"]])
        one, other = relevant.prompt(row, 2), flipped.prompt(row, 2)
        assert one.choices[one.answer] == f" {row['label']}"
        assert other.choices[other.answer] == f" {classes[(classes.index(row['label']) + 1) % len(classes)]}"
        _, shown, _ = parsed(one.prompt)
        _, turned, _ = parsed(other.prompt)
        assert [text for text, _ in shown] == [text for text, _ in turned]
        permuted = dict(zip(one.choices, other.choices))
        assert [permuted[label] for _, label in shown] == [label for _, label in turned]
    asked = transform(labels="relevant", instruction=True).prompt(ROWS[0], 2).prompt
    assert asked == f"Which mood?\n\n{relevant.prompt(ROWS[0], 2).prompt}"


def test_the_order_of_rows_and_the_process_change_nothing_and_epochs_do():
    made, rows = transform(), datasets.Dataset.from_list(ROWS)
    again = pickle.loads(pickle.dumps(made))
    plain = rows.map(made, remove_columns=["input", "label", "task", "instruction"])
    assert plain["input_ids"] == rows.map(again, num_proc=2)["input_ids"]
    backwards = rows.select(range(len(rows) - 1, -1, -1)).map(made)
    assert list(backwards["input_ids"])[::-1] == list(plain["input_ids"])
    later = rows.map(made, fn_kwargs={"epoch": 1})
    assert sum(a != b for a, b in zip(plain["input_ids"], later["input_ids"])) == len(rows)


def test_a_long_prompt_drops_exemplars_of_every_class_and_never_the_query():
    whole = transform(per_class=(6, 6))
    for row in ROWS[::7]:
        tokens = len(whole(row)["input_ids"])
        for limit in (tokens, tokens - 1, tokens // 2, tokens // 3):
            made = transform(per_class=(6, 6), max_length=limit)
            assert len(made(row)["input_ids"]) <= limit
            _, exemplars, query = parsed(made.prompt(row).prompt)
            by_symbol = Counter(symbol for _, symbol in exemplars)
            assert query == row["input"]
            assert len(set(by_symbol.values())) == 1
            assert len(by_symbol) == len(TOPICS[row["task"]])
            assert (next(iter(by_symbol.values())) == 6) == (limit == tokens)
    with pytest.raises(ValueError, match=r"makes a prompt of \d+ tokens with one exemplar of each class"):
        transform(max_length=12)(ROWS[0])


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (ROWS[:12], {}, "task 'mood' has the one class 'POSITIVE'"),
        (ROWS[:22], {}, r"task 'mood' has too few rows of {'NEGATIVE': 10}: per_class=\[2, 10\] needs 11"),
        (ROWS[:12] + ROWS[12:13] * 20, {}, r"too few rows of {'NEGATIVE': 1}"),
        (ROWS, {"per_class": (3, 2)}, r"per_class=\[3, 2\]"),
        (ROWS, {"per_class": (0, 2)}, r"per_class=\[0, 2\]"),
        (ROWS, {"labels": "none"}, "labels='none' is not known"),
        (ROWS, {"vocabulary": SymbolVocabulary(["words"], ["a", "b"], ["c"])}, "not 3 symbols of 2"),
    ],
)
def test_bad_arguments(rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        SymbolTuningTransform(rows, TOKENIZER, **arguments)


def test_bad_rows():
    with pytest.raises(ValueError, match=r"task 'taste' has the label 'SWEET'; known are \['mood', 'topic'\]"):
        transform()({"input": "a", "label": "SWEET", "task": "taste"})
    with pytest.raises(ValueError, match=r"has the label 'SWEET'; known are \['NEGATIVE', 'POSITIVE'\]"):
        transform()({"input": "a", "label": "SWEET", "task": "mood"})
    with pytest.raises(ValueError, match="instruction=True and a row has no 'instruction'"):
        transform(instruction=True)({"input": "a", "label": "SPORT", "task": "topic"})


# -- the data module ----------------------------------------------------------------------------------------------


def data(rows=ROWS, **kwargs):
    made = SymbolTuningData(rows, **{"tokenizer": TOKENIZER, "batch_size": 8, "max_length": 600, **kwargs})
    made.setup("fit")
    return made


def texts(made, split="train"):
    rows = made.rows(split)
    return [TOKENIZER.decode(rows[i]["input_ids"]) for i in range(len(rows))]


def test_prompts_of_the_data_module_are_those_of_the_transform():
    held_out = [{**row, "input": f"{row['input']} more"} for row in ROWS[::4]]
    other = [{**row, "task": "other"} for row in held_out[:6]]
    made = data(validation=[*held_out, *other], evaluation_exemplars=2, seed=1)
    assert texts(made) == [TOKENIZER.decode(transform(max_length=600)(row)["input_ids"]) for row in ROWS]
    rows, n = made.rows("train"), len(ROWS)
    later = [TOKENIZER.decode(rows[i + 3 * n]["input_ids"]) for i in range(n)]
    assert later == [TOKENIZER.decode(transform(max_length=600)(row, 3)["input_ids"]) for row in ROWS]
    # Held-out queries stand behind training rows, or, of a task that training has not, behind their own.
    evaluated = texts(made, "validation")
    assert len(evaluated) == len(held_out) + len(other)
    vocabulary = SymbolVocabulary()
    for row, text in zip(held_out, evaluated):
        query = text.rsplit("\n\n", 1)[1]
        assert row["input"] in query
        symbol = text.rsplit(" ", 1)[1]
        assert symbol not in vocabulary.words[False]
        assert not (symbol.isdigit() and int(symbol) < TRAINING)
        assert " more" not in text.rsplit("\n\n", 1)[0], "exemplars are training rows"
    assert all(" more" in text.rsplit("\n\n", 1)[0] for text in evaluated[len(held_out) :])


def test_evaluation_in_other_settings():
    made = data(validation=ROWS[:4], evaluation_labels="flipped", evaluation_instruction=True)
    for row, text in zip(ROWS, texts(made, "validation")):
        assert text.startswith("Which mood?\n\n")
        assert text.endswith(f" {'NEGATIVE' if row['label'] == 'POSITIVE' else 'POSITIVE'}")


def test_columns_and_named_labels():
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "kind": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_dict(
        {"sentence": [f" text {n}" for n in range(30)], "kind": [n % 2 for n in range(30)]}, features=features
    )
    made = data(rows, validation=rows, input_column="sentence", label_column="kind", evaluation_labels="relevant")
    assert {text.rsplit(" ", 1)[1] for text in texts(made, "validation")} == {"bad", "good"}
    with pytest.raises(ValueError, match=r"not \['input', 'label'\]: say which they are with input_column="):
        data(rows)


def test_no_task_dominates():
    options = {"examples_per_task": 25, "per_class": (1, 4), "evaluation_examples_per_task": 7}
    made = data(validation=ROWS, **options)
    assert len(made.rows("train")) == 24 + 25
    assert len(made.rows("validation")) == 14
    assert texts(made) == texts(data(**options))


def test_once_for_each_row():
    made = data(sampling="per_example", packing=True)
    assert len(made.rows("train")) < len(ROWS)
    with pytest.raises(ValueError, match="set sampling='per_example'"):
        data(packing=True)
    with pytest.raises(ValueError, match="streaming=True"):
        data(sampling="per_example", streaming=True)
    with pytest.raises(ValueError, match="evaluation_labels='some' is not known"):
        data(evaluation_labels="some")


# -- evaluation ---------------------------------------------------------------------------------------------------


def test_accuracy_by_setting():
    metric = InContextAccuracy()
    metric.update("symbols", [0, 1, 1], [0, 1, 0])
    metric.update("symbols", torch.tensor([1]), torch.tensor([1]))
    metric.update("flipped", [0], [1])
    assert metric.compute() == {"symbols": 0.75, "flipped": 0.0}
    with pytest.raises(ValueError, match="setting='none' is not known"):
        metric.update("none", [0], [0])
    assert len(SETTINGS) == 5


def test_a_tuned_network_follows_flipped_labels():
    """Two layers: tuned on natural labels it knows the words' own; tuned on symbols it reads the exemplars."""
    classes = {"yes": "abcd", "no": "qrst"}
    rows = [{"input": word, "label": label} for label, own in classes.items() for word in own]
    words = ["red", "green", "blue", "cat", "dog", "mat", "yes", "no"]
    tokenizer, vocabulary = tiny_tokenizer(), SymbolVocabulary(["words"], words, ["seven"])

    def prompts(labels, seed=2):
        options = {"per_class": (1, 1), "vocabulary": vocabulary, "layouts": [("", "")], "seed": seed}
        return SymbolTuningTransform(rows, tokenizer, labels=labels, **options)

    def tune(network, made, steps, rate):
        optimizer, losses = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.98)), []
        examples = [made(rows[i % 8], i) for i in range(6400)]
        examples = [{key: one[key] for key in ("input_ids", "labels")} for one in examples]
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
            loss = network(**collate([examples[(32 * step + i) % 6400] for i in range(32)], 0)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return sum(losses[-20:]) / 20

    def accuracy(network, setting):
        asked = [prompts(setting).prompt(row, epoch) for epoch in range(10**6, 10**6 + 4) for row in rows]
        metric = InContextAccuracy()
        metric.update(setting, chosen_labels(network, tokenizer, asked, 64), [one.answer for one in asked])
        return float(metric.compute()[setting])

    natural = tiny_llama()
    tune(natural, prompts("relevant"), 60, 3e-3)
    assert accuracy(natural, "relevant") > 0.9
    assert accuracy(natural, "flipped") < 0.1
    for seed in (2, 1, 0):  # a network so small does not always find how: begin anew where its training loss says so
        network = copy.deepcopy(natural)
        if tune(network, prompts("symbols", seed), 600, 1e-2) < 0.3:
            break
    assert accuracy(network, "flipped") > 0.9
    assert accuracy(network, "symbols") > 0.8
