"""Symbol tuning (paper 78, arXiv 2305.08298): in-context classification whose labels are arbitrary symbols.

Where neither an instruction nor a label says what a task is, a network has to learn it from the exemplars in its
prompt. That has k exemplars of every class, k uniform in 2 to 10, in random order; a random layout; no instruction; and
a query. Each class has a symbol, drawn anew for every prompt; the query's symbol alone is learnt:

    Input: a fine film        Input: what a bore        Input: I would go again
    Output: 8412              Output: RJ                Output:  -> 8412

Symbols are of three kinds, equally likely: integers, letters (A, B, ..., Z, AA, ...) and words. Training has 10,000 of
each (0 to 9,999 and the first 10,000 letter strings); evaluation has the next 90,000 of each.

The published code (JerryWeiAI/symbol-tuning) makes the symbols only; its words come from a list on the web, ours are
compounds of the short words below. Layouts are our wording of the paper's ten.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from random import Random
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from lightning_peft.datamodules.answers import choice_ids, score_choices
from lightning_peft.datamodules.chat_template import tokenize_parts
from lightning_peft.datamodules.rewriting import Rewriting, RewrittenData, Row, mapped
from lightning_peft.datamodules.sources import Source

KINDS = ("integers", "letters", "words")
LABELS = ("symbols", "relevant", "flipped")
#: Symbols of a kind for training; the integers and letters of evaluation follow, up to `EVALUATION`.
TRAINING, EVALUATION = 10_000, 100_000

#: What stands before an input, and between it and its label.
LAYOUTS = (
    ("Input: ", "\nOutput:"),
    ("Input: ", "\nLabel:"),
    ("Input: ", "\nTarget:"),
    ("Question: ", "\nAnswer:"),
    ("Q: ", "\nA:"),
    ("Text: ", "\nClass:"),
    ("X = ", "\nY ="),
    ("Student: ", "\nTeacher:"),
    ("Example: ", "\nSymbol:"),
    ("", " ->"),
)

# Any two make a word that means nothing for a task: 112,560 of them.
_PARTS = """
acorn almond amber anchor ankle apple apron arrow aspen attic autumn badge bagel bamboo banjo barley barrel basil
basket beacon beaver berry birch bishop blanket blossom bobbin bonnet bottle boulder bracket branch brass bread brick
bridge bronze brook broom bubble bucket buckle bugle bundle butter button cabin cable cactus camel candle canoe canvas
canyon carbon carpet carrot castle cedar cellar chalk cherry chimney cider cinder citron clover cobalt cobbler coconut
coffee collar comet copper coral cordial cotton cradle crane crayon cricket crimson crystal cushion cypress daisy
denim desert dolphin donkey dragon drawer drum eagle easel echo elbow elder ember emerald engine falcon feather fender
fennel fern ferry fiddle finch flannel flint flute forest fossil fountain fox gadget galley garden garlic garnet
ginger glacier glove goblet granite grape gravel grove guitar hammer hammock harbor harp harvest hazel helmet heron
hickory hollow honey horn hornet indigo ink iris island ivory ivy jacket jasmine jelly jigsaw jungle juniper kennel
kernel kettle kitten ladder lagoon lantern lark laurel lava lemon lentil lever lilac linen lizard lobster locket lotus
lumber magnet mallet mango maple marble marsh meadow melon mill mint mirror mitten monsoon moss motor muffin mustard
napkin nectar needle nettle nickel nutmeg oak oasis oat oboe olive onion opal orbit orchid otter oyster paddle palm
panda paper parrot pasture peach pebble pecan pencil pepper petal pewter piano pickle pigeon pillow pine pistol plank
plaster plum pocket pollen pond poplar poppy porch prairie pretzel prism pulley pumpkin quarry quartz quilt rabbit
radish raft rain raven reed ribbon ridge river robin rocket rose ruby rudder saddle saffron sage salmon sandal
sapphire satin saucer scarf sequoia shadow shell shovel silver sled smoke snow socket sorrel spade sparrow spindle
spoon spruce stable star steam stone straw sugar summit sun swallow table tallow tangle teapot temple thimble thistle
thread thunder tiger timber tin toast tomato topaz torch tower trellis trumpet tulip tundra turnip turtle umber valley
vanilla velvet vessel violet violin wagon walnut walrus water wheat whistle willow window winter wool wren yarrow
zephyr zinc
"""


@cache
def _compounds() -> list[str]:
    parts = _PARTS.split()
    made = list(dict.fromkeys(a + b for a in parts for b in parts if a != b))
    Random(0).shuffle(made)
    return made[:EVALUATION]


def letters(number: int) -> str:
    """The number-th string of letters, from 0: A, B, ..., Z, AA, AB, ...

    Args:
        number: From 0.

    >>> [letters(n) for n in (0, 25, 26, 701, 702)]
    ['A', 'Z', 'AA', 'ZZ', 'AAA']
    """
    made, number = "", number + 1
    while number:
        number, rest = divmod(number - 1, 26)
        made = chr(65 + rest) + made
    return made


class SymbolVocabulary:
    """The symbols, those of training and those of evaluation, which have none in common.

    Args:
        kinds: Any of "integers", "letters" and "words".
        words: Training words in place of our own.
        evaluation_words: Evaluation words in place of our own; those that training has are left out.

    Raises:
        ValueError: An unknown kind, or no words.
    """

    def __init__(
        self,
        kinds: Sequence[str] = KINDS,
        words: Sequence[str] | None = None,
        evaluation_words: Sequence[str] | None = None,
    ) -> None:
        if not kinds or set(kinds) - set(KINDS):
            raise ValueError(f"kinds={list(kinds)} must be some of {', '.join(map(repr, KINDS))}.")
        self.kinds = tuple(kinds)
        training = list(_compounds()[:TRAINING] if words is None else words)
        known = set(training)
        others = list(_compounds()[TRAINING:] if evaluation_words is None else evaluation_words)
        others = [word for word in others if word not in known]
        self.words = {False: training, True: others}
        if "words" in kinds and not (training and others):
            raise ValueError(
                f"there are {len(training)} words and {len(others)} others for evaluation: give some of both."
            )

    def size(self, evaluation: bool = False) -> int:
        """How many symbols there are."""
        numbers = EVALUATION - TRAINING if evaluation else TRAINING
        return sum(len(self.words[evaluation]) if kind == "words" else numbers for kind in self.kinds)

    def symbol(self, draws: Random, evaluation: bool = False) -> str:
        """One symbol: the kind first, then the symbol, each uniform."""
        kind = draws.choice(self.kinds)
        if kind == "words":
            return draws.choice(self.words[evaluation])
        number = draws.randrange(TRAINING, EVALUATION) if evaluation else draws.randrange(TRAINING)
        return str(number) if kind == "integers" else letters(number)

    def draw(
        self, number: int, draws: Random, evaluation: bool = False, tokens: Callable[[str], Sequence[Any]] = tuple
    ) -> list[str]:
        """Symbols none of which begins another, so that a network can be asked to choose between them.

        Args:
            number: How many.
            draws: What draws them.
            evaluation: Those of evaluation.
            tokens: How a symbol is compared; by default letter by letter.

        Raises:
            ValueError: There are not so many.
        """
        chosen: dict[str, tuple[Any, ...]] = {}
        for _ in range(100 * number):
            if len(chosen) == number:
                break
            made = self.symbol(draws, evaluation)
            own = tuple(tokens(made))
            if not any(own[: len(other)] == other[: len(own)] for other in chosen.values()):
                chosen[made] = own
        if len(chosen) < number:
            raise ValueError(
                f"there are not {number} symbols of {self.size(evaluation)} none of which begins another"
                + (f" (found: {', '.join(chosen)}): give more words= or kinds=, or a tokenizer that knows them.")
            )
        return list(chosen)


class InContextPrompt(NamedTuple):
    """A prompt, how it may go on, and which of these is right."""

    prompt: str
    choices: list[str]
    answer: int


class SymbolTuningTransform(Rewriting):
    """From a row to a prompt that ends with it: exemplars of its task before it, labels replaced by symbols.

    Everything is drawn from the seed, the epoch and the row.

    Args:
        exemplars: Rows with `input`, `label` and perhaps `task`: what prompts are made of. The query itself is never
            among its exemplars.
        tokenizer: A transformers tokenizer.
        max_length: Tokens of a prompt at most: exemplars are dropped, as many of each class, never the query.
        per_class: Least and most exemplars of each class in a prompt.
        vocabulary: The symbols.
        evaluation: Use the symbols of evaluation.
        labels: "symbols"; "relevant" are the task's own labels; "flipped" are those, each class with the next one's.
        instruction: Begin with the row's `instruction`.
        end_of_text: Put an end-of-text token behind the symbol, learnt too.
        layouts: What stands before an input, and between it and its label; one is drawn for each prompt.
        seed: Seed of the draws.

    Raises:
        ValueError: A task with one class, a class with too few exemplars, or too few symbols; for a row, an unknown
            task or label, or a prompt that is too long with a single exemplar of each class.
    """

    def __init__(
        self,
        exemplars: list[Row] | Any,
        tokenizer: Any,
        max_length: int | None = None,
        per_class: tuple[int, int] = (2, 10),
        vocabulary: SymbolVocabulary | None = None,
        evaluation: bool = False,
        labels: str = "symbols",
        instruction: bool = False,
        end_of_text: bool = False,
        layouts: Sequence[tuple[str, str]] = LAYOUTS,
        seed: int = 0,
    ) -> None:
        import datasets

        least, most = per_class
        if not 1 <= least <= most:
            raise ValueError(f"per_class={list(per_class)} must be the least and most exemplars of a class, from 1.")
        if labels not in LABELS:
            raise ValueError(f"labels={labels!r} is not known: use one of {', '.join(map(repr, LABELS))}.")
        self._rows = datasets.Dataset.from_list(exemplars) if isinstance(exemplars, list) else exemplars
        self.tokenizer, self.max_length, self.per_class = tokenizer, max_length, (least, most)
        self.vocabulary = vocabulary or SymbolVocabulary()
        self.evaluation, self.labels, self.instruction = evaluation, labels, instruction
        self.end_of_text, self.layouts, self.seed = end_of_text, tuple(layouts), seed
        self._tasks = _by_task_and_label(self._rows)
        for task, classes in self._tasks.items():
            if len(classes) < 2:
                raise ValueError(f"task {task!r} has the one class {next(iter(classes))!r}: it takes two to classify.")
            few = {label: len(own) for label, own in classes.items() if len(own) <= most}
            if few:
                raise ValueError(
                    f"task {task!r} has too few rows of {few}: per_class={[least, most]} needs {most + 1} of each "
                    "class, a query and its exemplars. Give more rows, or fewer exemplars."
                )
        self._names([""] * max(map(len, self._tasks.values())), Random(seed))  # raises where there are too few symbols

    def rewrite(self, row: Row, epoch: int) -> Row:
        made = self.prompt(row, epoch)
        return self._tokens(made)

    def prompt(self, row: Row, epoch: int = 0) -> InContextPrompt:
        """The prompt of a row, as text.

        Args:
            row: `input`, `label`, and perhaps `task` and `instruction`.
            epoch: The epoch to draw for.
        """
        task, label = _task(row), str(row["label"])
        classes = self._tasks.get(task)
        if classes is None or label not in classes:
            known = sorted(self._tasks) if classes is None else sorted(classes)
            raise ValueError(f"a row of task {task!r} has the label {label!r}; known are {known}.")
        names = self._names(list(classes), self.draws(epoch, "symbols", task, row["input"]))
        draws = self.draws(epoch, "exemplars", task, row["input"])
        layout, count = draws.choice(self.layouts), draws.randint(*self.per_class)
        drawn = [self._exemplars(numbers, row["input"], count, draws) for numbers in classes.values()]
        order = draws.random()
        for n in range(count, 0, -1):
            shown = [(text, name) for texts, name in zip(drawn, names) for text in texts[:n]]
            Random(order).shuffle(shown)
            answer = list(classes).index(label)
            made = InContextPrompt(self._text(shown, row, layout), [f" {name}" for name in names], answer)
            tokens = 0 if self.max_length is None else len(self._tokens(made)["input_ids"])
            if self.max_length is None or tokens <= self.max_length:
                return made
        raise ValueError(
            f"a row of task {task!r} makes a prompt of {tokens} tokens with one exemplar of each class, and max_length="
            f"{self.max_length}: raise it, or leave out rows that are so long."
        )

    def settings(self) -> dict[str, Any]:
        known = [self.vocabulary.kinds, self.vocabulary.words[False], self.vocabulary.words[True]]
        return {**super().settings(), "vocabulary": known, "exemplars": self._rows._fingerprint}

    def _names(self, classes: list[str], draws: Random) -> list[str]:
        """What stands for each class."""
        if self.labels == "relevant":
            return classes
        if self.labels == "flipped":
            return [*classes[1:], classes[0]]

        def tokens(symbol: str) -> Sequence[int]:
            return self.tokenizer(f" {symbol}", add_special_tokens=False)["input_ids"]

        return self.vocabulary.draw(len(classes), draws, self.evaluation, tokens)

    def _exemplars(self, numbers: list[int], query: str, count: int, draws: Random) -> list[str]:
        texts = self._rows[draws.sample(numbers, count + 1)]["input"]  # one more, in case the query is among them
        return [text for text in texts if text != query][:count]

    def _text(self, shown: list[tuple[str, str]], row: Row, layout: tuple[str, str]) -> str:
        before, between = layout
        begin = []
        if self.instruction:
            if not row.get("instruction"):
                raise ValueError("instruction=True and a row has no 'instruction'.")
            begin = [row["instruction"]]
        exemplars = [f"{before}{text}{between} {name}" for text, name in shown]
        return "\n\n".join([*begin, *exemplars, f"{before}{row['input']}{between}"])

    def _tokens(self, made: InContextPrompt) -> Row:
        parts = [(made.prompt, False), (made.choices[made.answer], True)]
        return dict(tokenize_parts(self.tokenizer, parts, ended=self.end_of_text))


def _task(row: Row) -> str:
    return str(row.get("task") or "")


def _by_task_and_label(rows: Any) -> dict[str, dict[str, list[int]]]:
    """Numbers of the rows of each task's classes, both sorted by name; of equal inputs the first only."""
    labels, inputs = rows["label"], rows["input"]
    tasks = rows["task"] if "task" in rows.column_names else [""] * len(rows)
    found: dict[str, dict[str, list[int]]] = {}
    seen = set()
    for number, (task, label, text) in enumerate(zip(tasks, labels, inputs)):
        task = str(task or "")
        if (task, text) not in seen:
            seen.add((task, text))
            found.setdefault(task, {}).setdefault(str(label), []).append(number)
    return {task: dict(sorted(found[task].items())) for task in sorted(found)}


class SymbolTuningData(RewrittenData):
    """Classification sets as in-context prompts with arbitrary labels.

    Training prompts are drawn anew in every epoch. Held-out rows are queries behind exemplars of the training rows (or
    their own, of a task that training has not), with symbols that training has not.

    Args:
        data: Rows with an input, a label and perhaps a task, from any source of `InstructionData`.
        per_class: Least and most exemplars of each class in a training prompt.
        sampling: Draw prompts "per_epoch", anew in every epoch, or "per_example", once for each row (as packing needs
            it).
        kinds: Kinds of symbols: any of "integers", "letters" and "words".
        words: Training words in place of our own.
        evaluation_words: Evaluation words in place of our own.
        input_column: The column of inputs.
        label_column: The column of labels: texts, numbers, or a `ClassLabel` with names.
        task_column: The column that says a row's task, where there are several.
        examples_per_task: Training rows of a task at most, so that none dominates.
        evaluation_exemplars: Exemplars of each class in a held-out prompt.
        evaluation_examples_per_task: Held-out rows of a task at most.
        evaluation_labels: Labels of held-out prompts: "symbols", "relevant" or "flipped".
        evaluation_instruction: Begin held-out prompts with the row's `instruction`.
        end_of_text: Put an end-of-text token behind each symbol, learnt too.
        max_length: Tokens of a prompt at most: exemplars are dropped, never the query.
        **kwargs: Further arguments of `InstructionData`.

    Raises:
        ValueError: As `SymbolTuningTransform`; or a stream, which has no exemplars at hand.
    """

    def __init__(
        self,
        data: Source,
        per_class: tuple[int, int] = (2, 10),
        sampling: str = "per_epoch",
        kinds: list[str] | None = None,
        words: list[str] | None = None,
        evaluation_words: list[str] | None = None,
        input_column: str = "input",
        label_column: str = "label",
        task_column: str = "task",
        examples_per_task: int = 25_000,
        evaluation_exemplars: int = 4,
        evaluation_examples_per_task: int = 100,
        evaluation_labels: str = "symbols",
        evaluation_instruction: bool = False,
        end_of_text: bool = False,
        max_length: int = 2048,
        **kwargs: Any,
    ) -> None:
        super().__init__(data=data, sampling=sampling, max_length=max_length, **kwargs)
        if self.streaming:
            raise ValueError("streaming=True: exemplars are drawn from a data set at hand; give a part of the stream.")
        if evaluation_labels not in LABELS:
            known = ", ".join(map(repr, LABELS))
            raise ValueError(f"evaluation_labels={evaluation_labels!r} is not known: use one of {known}.")
        self.columns = {"input": input_column, "label": label_column, "task": task_column}
        self.vocabulary = SymbolVocabulary(kinds or KINDS, words, evaluation_words)
        self.limits = {"train": examples_per_task, "held out": evaluation_examples_per_task}
        self.options: dict[str, Any] = {
            "max_length": max_length,
            "vocabulary": self.vocabulary,
            "end_of_text": end_of_text,
            "seed": self.seed,
        }
        self.training: dict[str, Any] = {"per_class": (per_class[0], per_class[1])}
        self.evaluation: dict[str, Any] = {
            "per_class": (evaluation_exemplars, evaluation_exemplars),
            "evaluation": True,
            "labels": evaluation_labels,
            "instruction": evaluation_instruction,
        }
        self._originals: dict[str, Any] = {}

    def originals(self, split: str) -> Any:
        if split not in self._originals:
            rows = super().originals(split)
            missing = [self.columns[name] for name in ("input", "label") if self.columns[name] not in rows.column_names]
            if missing:
                raise ValueError(
                    f"rows have the columns {sorted(rows.column_names)} and not {missing}: say which they are with "
                    "input_column= and label_column=."
                )
            names = getattr(rows.features[self.columns["label"]], "names", None)
            named = partial(_named, columns=self.columns, names=names)
            rows = mapped(rows, named, json.dumps([self.columns, names]))
            limit = self.limits["train" if split == "train" else "held out"]
            self._originals[split] = _limited(rows, limit, self.seed, split)
        return self._originals[split]

    def rewriting(self, split: str) -> SymbolTuningTransform:
        exemplars = self.originals("train")
        if split == "train":
            return SymbolTuningTransform(exemplars, self.tokenizer, **self.options, **self.training)
        import datasets

        known, own = set(exemplars["task"]), self.originals(split)
        other = [number for number, task in enumerate(own["task"]) if task not in known]
        if other:
            exemplars = datasets.concatenate_datasets([exemplars, own.select(other)])
        return SymbolTuningTransform(exemplars, self.tokenizer, **self.options, **self.evaluation)


def _named(row: Row, columns: dict[str, str], names: list[str] | None) -> Row:
    """A row under the names that the transform reads, its label as text."""
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    label = row[columns["label"]]
    return {
        **kept,
        "input": str(row[columns["input"]]).strip(),
        "label": str(label if names is None else names[label]).strip(),
        "task": str(row.get(columns["task"]) or ""),
    }


def _limited(rows: Any, limit: int, seed: int, split: str) -> Any:
    """At most `limit` rows of each task, drawn by the seed, in their order."""
    by_task: dict[str, list[int]] = {}
    for number, task in enumerate(rows["task"]):
        by_task.setdefault(task, []).append(number)
    large = [task for task, numbers in by_task.items() if len(numbers) > limit]
    if not large:
        return rows
    for task in large:
        by_task[task] = Random(f"{seed}:{task}").sample(by_task[task], limit)
    rank_zero_info(f"{split} data: {len(large)} tasks are cut to {limit} rows each.")
    return rows.select(sorted(number for numbers in by_task.values() for number in numbers))


# -- evaluation ---------------------------------------------------------------------------------------------------

#: What the paper compares: whether a prompt has an instruction, and whether its labels have to do with the task.
SETTINGS = ("instruction, relevant", "instruction, symbols", "relevant", "symbols", "flipped")


def chosen_labels(network: Any, tokenizer: Any, prompts: list[InContextPrompt], batch_size: int = 8) -> list[int]:
    """Which label the network finds most probable behind each prompt.

    Args:
        network: A causal language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        batch_size: Labels scored at once.

    Returns:
        For each prompt the number of its choice.
    """
    asked = [choice_ids(tokenizer, one.prompt, one.choices) for one in prompts]
    scores = score_choices(network, [ids for ids, _ in asked], [choices for _, choices in asked], batch_size)
    return [max(range(len(own)), key=own.__getitem__) for own in scores]


class InContextAccuracy(Metric):
    """Accuracy in each of `SETTINGS`: with and without instruction, with relevant labels, symbols, and flipped ones."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros(len(SETTINGS)), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(SETTINGS)), dist_reduce_fx="sum")

    def update(self, setting: str, predicted: Sequence[int] | Tensor, answers: Sequence[int] | Tensor) -> None:
        """Adds prompts of a setting.

        Args:
            setting: One of `SETTINGS`.
            predicted: The label chosen for each prompt.
            answers: The label that is right.
        """
        if setting not in SETTINGS:
            raise ValueError(f"setting={setting!r} is not known: use one of {', '.join(map(repr, SETTINGS))}.")
        correct: Any = self.correct
        count: Any = self.count
        hits = torch.as_tensor(predicted) == torch.as_tensor(answers)
        correct[SETTINGS.index(setting)] += hits.sum().to(correct)
        count[SETTINGS.index(setting)] += len(hits)

    def compute(self) -> dict[str, Tensor]:
        """Accuracy by setting, of those that there were prompts for."""
        correct: Any = self.correct
        count: Any = self.count
        return {name: correct[i] / count[i] for i, name in enumerate(SETTINGS) if count[i]}
