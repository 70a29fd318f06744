"""Where rows come from: anything that `datasets` reads, or Python's own lists and dictionaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

# Where a value may be anything, jsonargparse reads text such as "a: b" in a YAML as a mapping: text comes first.
_Value = Union[str, Any]  # noqa: UP007 (evaluated on every supported Python)
#: What `read_rows` takes.
Source = Union[str, list[dict[str, _Value]], dict[str, _Value], Any]  # noqa: UP007

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
_SPLITS = {"train", "validation", "test"}


def read_rows(source: Any, split: str = "train", name: str | None = None, streaming: bool = False) -> Any:
    """The rows of a source.

    Args:
        source: A hub name; a path to a JSON, JSON-lines, Parquet, CSV or text file, or a pattern such as
            `data/*.parquet`; a folder that `save_to_disk` wrote; a list of rows; a dictionary of columns, or of the
            splits "train", "validation" and "test", each again a source; or a data set of `datasets`.
        split: The split of a source that has several; `datasets`' slices such as "train[:10%]" as well.
        name: The configuration of a hub data set.
        streaming: Read as a stream rather than at once.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` where `streaming` (or given as one).

    Raises:
        FileNotFoundError: A path that is not there.
        ValueError: The source is of a kind not named above, has no such split, or is empty.
    """
    import datasets

    if _holds_splits(source):
        if split not in source:
            raise ValueError(f"data has the splits {sorted(source)} and not {split!r}.")
        return read_rows(source[split], name=name, streaming=streaming)
    if isinstance(source, list):
        rows = datasets.Dataset.from_list(source)
    elif isinstance(source, dict):
        rows = datasets.Dataset.from_dict(source)
    elif isinstance(source, (str, Path)):
        rows = _read_path(str(source), split, name, streaming)
    elif isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        rows = source
    else:
        raise ValueError(
            f"data is a {type(source).__name__}: give a hub name, a path, a list of rows, a dictionary of columns, or "
            "a data set of the datasets library."
        )
    if isinstance(rows, datasets.IterableDataset):
        return rows
    if len(rows) == 0:
        raise ValueError(f"the data set is empty ({_told(source)}, split {split!r}): there is nothing to learn from.")
    return rows.to_iterable_dataset() if streaming else rows


def has_split(source: Any, split: str) -> bool:
    """Whether `split` names a split of the source, rather than a file."""
    if _holds_splits(source):
        return split in source
    return isinstance(source, str) and Path(split).suffix not in _BUILDERS and not Path(split).exists()


def _holds_splits(source: Any) -> bool:
    """A `DatasetDict`, or a plain dictionary whose keys are splits rather than columns."""
    import datasets

    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return True
    return isinstance(source, dict) and bool(source) and set(source) <= _SPLITS


def _read_path(source: str, split: str, name: str | None, streaming: bool) -> Any:
    import datasets

    path = Path(source)
    if path.suffix in _BUILDERS:
        if "*" not in source and not path.is_file():
            raise FileNotFoundError(f"data={source!r}: there is no such file.")
        options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        return datasets.load_dataset(
            _BUILDERS[path.suffix], data_files={"train": source}, split=split, streaming=streaming, **options
        )
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        loaded = datasets.load_from_disk(source)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"data={source!r} has the splits {sorted(loaded)} and not {split!r}.")
            loaded = loaded[split]
        return loaded
    return datasets.load_dataset(source, name, split=split, streaming=streaming)


def split_off(rows: Any, fraction: float, seed: int, what: str) -> tuple[Any, Any]:
    """The rows without a random `fraction`, and that fraction; the same for the same rows and seed.

    Raises:
        ValueError: The fraction is not in (0, 1), or leaves one side empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"{what}={fraction} must be a fraction in (0, 1), or name a split or a file.")
    n = round(len(rows) * fraction)
    if not 0 < n < len(rows):
        raise ValueError(f"{what}={fraction} of {len(rows)} rows leaves one side empty: give more rows or a split.")
    made = rows.train_test_split(test_size=n, seed=seed)
    return made["train"], made["test"]


def _told(source: Any) -> str:
    return repr(source) if isinstance(source, str) else f"a {type(source).__name__}"
