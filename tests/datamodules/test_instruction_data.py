"""From any source to batches, with every bad input told before the first step."""

import datasets
import pytest
import torch

from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.datamodules.look_ahead import LookAheadDataLoader, ResumableSampler
from tests.tiny import tiny_tokenizer

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
ROWS = [{"prompt": f"{word} ", "completion": " ".join(WORDS[:n])} for n, word in enumerate(WORDS, 1)]
CHAT = [
    {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": f"yes {word}"}]} for word in WORDS
]


def data(source=ROWS, **kwargs):
    kwargs = {"tokenizer": tiny_tokenizer(), "batch_size": 4, "shuffle": False, **kwargs}
    made = InstructionData(source, **kwargs)
    made.prepare_data()
    made.setup("fit")
    return made


def texts(loader):
    tokenizer = tiny_tokenizer()
    return [
        tokenizer.decode(ids[mask.bool()])
        for batch in loader
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]


EXPECTED = [f"{row['prompt']}{row['completion']} <|im_end|>" for row in ROWS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _columns():
    return {key: [row[key] for row in ROWS] for key in ROWS[0]}


@pytest.mark.parametrize("kind", ["list", "columns", "splits", "dataset", "dataset_dict"])
def test_sources_in_memory(kind):
    source = {
        "list": ROWS,
        "columns": _columns(),
        "splits": {"train": ROWS, "validation": ROWS[:2]},
        "dataset": datasets.Dataset.from_list(ROWS),
        "dataset_dict": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
    }[kind]
    assert texts(data(source).train_dataloader()) == EXPECTED


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv", "tsv", "disk", "pattern"])
def test_sources_on_disk(suffix, tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{suffix}"
    if suffix in ("json", "jsonl"):
        rows.to_json(path)
    elif suffix == "parquet":
        rows.to_parquet(path)
    elif suffix == "csv":
        rows.to_csv(path)
    elif suffix == "tsv":
        rows.to_csv(path, sep="\t")
    elif suffix == "disk":
        datasets.DatasetDict(train=rows, validation=rows.select([1])).save_to_disk(path)
    else:
        rows.select(range(4)).to_json(tmp_path / "part-0.jsonl")
        rows.select(range(4, 10)).to_json(tmp_path / "part-1.jsonl")
        path = tmp_path / "part-*.jsonl"
    made = data(str(path), validation="validation" if suffix == "disk" else ROWS[1:2])
    assert texts(made.train_dataloader()) == EXPECTED
    assert texts(made.val_dataloader()) == EXPECTED[1:2]


def test_batches_literal():
    batch = next(iter(data(CHAT, batch_size=2).train_dataloader()))
    ids = [3, 7, 5, 9, 4, 5, 3, 8, 5, 35, 9, 4, 5]
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == [-100] * 9 + [35, 9, 4] + [-100]
    assert batch["attention_mask"].sum(1).tolist() == [13, 13]


def test_everything_learnt_when_asked():
    batch = next(iter(data(CHAT, assistant_only_loss=False).train_dataloader()))
    assert torch.equal(batch["labels"], batch["input_ids"])
    batch = next(iter(data(ROWS, completion_only_loss=False).train_dataloader()))
    assert (batch["labels"] == torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)).all()


def test_conversational_prompt_and_completion():
    rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in CHAT]
    ours, theirs = data(rows).train_dataloader(), data(CHAT).train_dataloader()
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_sharegpt_and_text():
    rows = [{"conversations": [{"from": "human", "value": w}, {"from": "gpt", "value": f"yes {w}"}]} for w in WORDS]
    assert texts(data(rows).train_dataloader()) == texts(data(CHAT).train_dataloader())
    assert texts(data([{"text": "a b"}]).train_dataloader()) == ["a b <|im_end|>"]


def test_fractions_are_disjoint_whole_and_the_same_each_time():
    made = [data(validation=0.2, test=0.3, seed=4) for _ in range(2)]
    for one in made:
        one.setup("test")
    parts = [
        [texts(loader) for loader in (m.train_dataloader(), m.val_dataloader(), m.test_dataloader())] for m in made
    ]
    assert parts[0] == parts[1]
    assert [len(part) for part in parts[0]] == [5, 2, 3]
    assert sorted(text for part in parts[0] for text in part) == sorted(EXPECTED)
    other = data(validation=0.2, test=0.3, seed=5)
    assert texts(other.val_dataloader()) != parts[0][1]


def test_weight_and_further_columns():
    rows = [{**row, "weight": 0.5 * n, "group": n, "source": f"s{n}"} for n, row in enumerate(ROWS)]
    batch = next(iter(data(rows, keep_columns=["group", "source"]).train_dataloader()))
    assert batch["weight"].tolist() == [0.0, 0.5, 1.0, 1.5]
    assert batch["group"].tolist() == [0, 1, 2, 3]
    assert batch["source"] == ["s0", "s1", "s2", "s3"]


def test_transforms_run_before_tokenising():
    def swapped(row):
        return {"prompt": row["completion"] + " ", "completion": row["prompt"].strip()}

    assert texts(data(transforms=[swapped]).train_dataloader())[1] == "a b b <|im_end|>"


def test_chat_template_from_a_file(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    made = data(
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        chat_template=str(path),
    )
    assert texts(made.train_dataloader()) == ["a b"]


def test_packing_keeps_every_document_and_every_label():
    plain, packed = data(), data(packing=True, max_length=16)
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in plain.train_dataloader())
    batches = list(packed.train_dataloader())
    assert sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches) == count
    assert "attention_mask" not in batches[0]
    assert len(packed.rows("train")) == 5  # 75 tokens in rows of 16
    documents = []
    for batch in batches:
        for ids, numbers, positions in zip(batch["input_ids"], batch["document_ids"], batch["position_ids"]):
            for number in range(int(numbers.max()) + 1):
                here = numbers == number
                assert positions[here].tolist() == list(range(int(here.sum())))
                documents.append(tiny_tokenizer().decode(ids[here]))
    assert sorted(documents) == sorted(EXPECTED)
    # Validation is never packed.
    assert "attention_mask" in next(iter(data(packing=True, validation=ROWS).val_dataloader()))


@pytest.mark.parametrize(("rows", "batch_size"), [(9, 2), (7, 3), (5, 1)])
def test_uneven_ranks_run_equally_many_batches_and_count_every_row_once(rows, batch_size):
    made = data(ROWS[:rows], validation=ROWS[:rows], batch_size=batch_size)
    expected = sum(int((batch["labels"] != -100).sum()) for batch in made.train_dataloader())
    for split in ("train", "validation"):
        counted, batches = 0, []
        for rank in range(2):
            sampler = ResumableSampler(made.rows(split), 2, rank)
            loader = LookAheadDataLoader(
                made.rows(split), batch_size, sampler=sampler, collate_fn=made.train_dataloader().collate_fn
            )
            batches.append(len(list(loader)))
            counted += sum(int((batch["labels"] != -100).sum()) for batch in loader)
        assert counted == expected
        assert batches[0] == batches[1]


class Counting:
    """A tokenizer that counts how often it is asked."""

    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


def test_tokens_are_cached_by_what_they_depend_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    datasets.Dataset.from_list(ROWS).to_json(path)

    def calls(**kwargs):
        tokenizer = Counting(tiny_tokenizer(**kwargs.pop("tokenizer_arguments", {})))
        tokenizer(["a", "b c"], padding=True)  # what it was used for before is no part of what it does
        tokenizer.calls = 0
        assert len(data(str(path), tokenizer=tokenizer, **kwargs).rows("train").dataset) == 10
        return tokenizer.calls

    assert calls() == 10
    assert calls() == 0
    assert calls(batch_size=2, packing=True) == 0
    assert calls(max_length=500) == 10
    assert calls(tokenizer_arguments={"eos_token": "<eos>"}) == 10
    assert calls() == 0


def test_streaming(tmp_path):
    path = tmp_path / "rows.jsonl"
    datasets.Dataset.from_list(ROWS).to_json(path)
    made = data(str(path), streaming=True, validation=str(path))
    assert texts(made.train_dataloader()) == EXPECTED
    assert texts(made.val_dataloader()) == EXPECTED
    assert texts(data(datasets.Dataset.from_list(ROWS).to_iterable_dataset()).train_dataloader()) == EXPECTED
    shuffled = data(str(path), streaming=True, shuffle=True).train_dataloader()
    first, second = texts(shuffled), texts(shuffled)
    assert sorted(first) == sorted(second) == sorted(EXPECTED)
    assert first != second
    # Row by row, a stream refuses what a data set refuses at once.
    with pytest.raises(ValueError, match="nothing to learn within max_length=2"):
        texts(data([{"prompt": "a b c ", "completion": "d"}], streaming=True, max_length=2).train_dataloader())
    dropped = data(str(path), streaming=True, overlong="drop", max_length=4)
    assert texts(dropped.train_dataloader()) == EXPECTED[:2]


def test_overlong():
    assert texts(data(max_length=4).train_dataloader())[5] == "f a b c"
    assert texts(data(max_length=4, overlong="drop").train_dataloader()) == EXPECTED[:2]


LONG = [{"prompt": "a b c d ", "completion": "e"}, *ROWS[:2]]
SILENT = [{"messages": [{"role": "user", "content": "a"}]}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": []}, "empty"),
        ({"source": LONG, "max_length": 4}, r"3 train rows: in 1 \(rows 0\) the prompt alone fills max_length=4"),
        ({"source": LONG, "max_length": 4, "overlong": "raise"}, r"1 \(rows 0\) of 3 train rows are longer"),
        ({"source": LONG[:1] * 2, "max_length": 4}, "every label of all 2 train rows is masked"),
        ({"source": LONG[:1] * 2, "max_length": 4, "overlong": "drop"}, "leaves none of 2 train rows"),
        ({"source": SILENT * 7}, r"every label of all 7 train rows.*7 \(rows 0, 1, 2, 3, 4, ...\) have no assistant"),
        ({"source": CHAT + SILENT}, r"11 train rows: 1 \(rows 10\) have no assistant"),
        ({"validation": LONG, "max_length": 4}, "3 validation rows"),
        ({"source": CHAT, "tokenizer": tiny_tokenizer(None)}, "no chat template"),
        ({"source": CHAT, "chat_template": "{{ messages | length }}"}, "cannot be masked"),
        (
            {"source": [{"question": "a", "answer": "b"}]},
            r"columns \['answer', 'question'\].*'prompt' and 'completion'",
        ),
        ({"source": [{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}]}, "both be"),
        ({"source": [{**ROWS[0], "weight": None}]}, "weight=None"),
        ({"source": [{**ROWS[0], "weight": float("nan")}]}, "weight=nan"),
        ({"source": 7}, "data is a int"),
        ({"source": {"train": ROWS}, "train_split": "test"}, r"splits \['train'\] and not 'test'"),
        ({"tokenizer": None}, "has no tokenizer"),
        ({"validation": 0.0}, r"validation=0.0 must be a fraction in \(0, 1\)"),
        ({"test": 1.0}, r"test=1.0 must be a fraction"),
        ({"validation": 0.01}, "leaves one side empty"),
        ({"validation": 0.5, "streaming": True}, "a stream has no fractions"),
        ({"overlong": "cut"}, "overlong='cut' is not known: use one of 'truncate', 'drop', 'raise'"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"packing": True, "streaming": True}, "packing=True needs"),
        ({"source": datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "packing": True}, "data is a stream"),
        ({"packing": True, "keep_columns": ["x"]}, "packing=True needs"),
    ],
)
def test_bad_inputs(arguments, message):
    with pytest.raises(ValueError, match=message):
        data(arguments.pop("source", ROWS), **arguments)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no/rows.jsonl"):
        data("no/rows.jsonl")
