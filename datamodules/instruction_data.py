"""Instruction data from anywhere, as batches for a `FineTuningModule` (or any module that takes `labels`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from torch.utils.data import DataLoader

from lightning_peft.datamodules.collate import TokenRows, collator
from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from lightning_peft.datamodules.packing import best_fit_decreasing
from lightning_peft.datamodules.resumable_sampler import ResumableSampler
from lightning_peft.datamodules.sources import Source, has_split, read_rows, split_off
from lightning_peft.datamodules.tokenized import OVERLONG, tokenized

SPLITS = ("train", "validation", "test")


class InstructionData(L.LightningDataModule):
    """Conversations, prompts with completions, or plain texts, in the formats of TRL.

    A row has `messages` (turns with `role` and `content`; ShareGPT's `conversations` too), or `prompt` and `completion`
    (both texts, or both lists of messages), or `text`; and perhaps a `weight`, by which its loss is multiplied.
    Training resumes in mid-epoch exactly, and its loader looks ahead for the exact count of the optimizer step. Rows
    that fill up the last batch of uneven ranks count for nothing.

    Args:
        data: A hub name, a path (JSON, JSON lines, Parquet, CSV, text, `save_to_disk`), a list of rows, a dictionary of
            columns or of splits, or a data set of the `datasets` library.
        validation: The same, or a split's name, or a fraction of the training rows to hold out.
        test: As `validation`.
        tokenizer: Name, folder or `.gguf` file, or one already loaded; by default that of the LightningModule.
        dataset_config: The configuration of a hub data set.
        train_split: The split of `data` to train on.
        max_length: Tokens in a row at most.
        batch_size: Rows in a batch, on each rank.
        eval_batch_size: The same for validation and test; by default `batch_size`.
        packing: Fill training rows up to `max_length` with whole documents, which do not see each other.
        assistant_only_loss: In conversations learn the assistant's turns and their end-of-turn tokens only.
        completion_only_loss: Learn completions only, rather than prompts as well.
        chat_template: In place of the tokenizer's own: the template, or a path to it.
        overlong: Rows longer than `max_length`: "truncate" them (an error where nothing to learn is left), "drop" them,
            or "raise".
        shuffle: Shuffle the training rows every epoch.
        drop_last: Leave out a last batch that is not full.
        seed: Seed of the order and of fractions held out.
        num_workers: Processes that load batches.
        num_proc: Processes that tokenise.
        pad_to_multiple_of: Batches are padded to a multiple of this length.
        keep_columns: Further columns carried to the batch: numbers as tensors [batch], others as lists.
        token_columns: Further columns that hold a value for each token of the tokenised row, such as a mask: cut,
            packed and padded (with 0) like the tokens, as tensors [batch, time].
        transforms: Functions from row to row, applied in order before tokenising.
        streaming: Read `data` as a stream. Then no packing, no fractions, and a shuffle by buffer.
        shuffle_buffer: Rows in the shuffle buffer of a stream; a stream that is shuffled does not resume exactly.

    Raises:
        ValueError: An argument is out of range, the data set is empty, rows have nothing to learn, or the template
            cannot be masked: all before the first step, each with its own message.
    """

    def __init__(
        self,
        data: Source,
        validation: float | Source | None = None,
        test: float | Source | None = None,
        tokenizer: str | Any | None = None,
        dataset_config: str | None = None,
        train_split: str = "train",
        max_length: int = 1024,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        packing: bool = False,
        assistant_only_loss: bool = True,
        completion_only_loss: bool = True,
        chat_template: str | None = None,
        overlong: str = "truncate",
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        pad_to_multiple_of: int = 1,
        keep_columns: list[str] | None = None,
        token_columns: list[str] | None = None,
        transforms: list[Callable[[dict[str, Any]], dict[str, Any]]] | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__()
        for what, least in {"max_length": 2, "batch_size": 1, "pad_to_multiple_of": 1, "num_workers": 0}.items():
            if locals()[what] < least:
                raise ValueError(f"{what}={locals()[what]} must be at least {least}.")
        if overlong not in OVERLONG:
            raise ValueError(f"overlong={overlong!r} is not known: use one of {', '.join(map(repr, OVERLONG))}.")
        for what, value in {"validation": validation, "test": test}.items():
            if isinstance(value, (int, float)) and not 0 < value < 1:
                raise ValueError(f"{what}={value} must be a fraction in (0, 1), or name a split or a file.")
        if packing and (streaming or keep_columns):
            raise ValueError(
                "packing=True needs streaming=False and no keep_columns (a packed row has many documents)."
            )
        self.data, self.held_out = data, {"test": test, "validation": validation}
        self._tokenizer = tokenizer
        self.dataset_config, self.train_split, self.streaming = dataset_config, train_split, streaming
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.packing, self.overlong, self.max_length = packing, overlong, max_length
        self.shuffle, self.drop_last, self.seed, self.shuffle_buffer = shuffle, drop_last, seed, shuffle_buffer
        self.num_workers, self.num_proc, self.pad_to_multiple_of = num_workers, num_proc, pad_to_multiple_of
        self.transforms = transforms or []
        if chat_template is not None and "{" not in chat_template:
            chat_template = Path(chat_template).read_text()
        self.row_options: dict[str, Any] = {
            "max_length": max_length,
            "assistant_only_loss": assistant_only_loss,
            "completion_only_loss": completion_only_loss,
            "chat_template": chat_template,
            "keep_columns": tuple(keep_columns or ()),
            "token_columns": tuple(token_columns or ()),
        }
        #: Columns with a value for each token, of the rows or made on the way.
        self.token_columns: tuple[str, ...] = tuple(token_columns or ())
        self._raw: dict[str, Any] | None = None
        self._rows: dict[str, Any] = {}
        self._loader: LookAheadDataLoader | None = None
        self._position: dict[str, Any] | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer in use.

        Raises:
            ValueError: None was given and there is no LightningModule that has one.
        """
        if isinstance(self._tokenizer, str):
            from lightning_peft.models.pretrained import load_tokenizer

            self._tokenizer = load_tokenizer(self._tokenizer)
        if self._tokenizer is None and self.trainer is not None:
            self._tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if self._tokenizer is None:
            raise ValueError(
                f"{type(self).__name__} has no tokenizer: give tokenizer=, or train a module that has one."
            )
        return self._tokenizer

    # -- rows -----------------------------------------------------------------------------------------------------

    def read(self) -> dict[str, Any]:
        """Rows by split, before any transform. A data module with a source of its own overrides this."""
        train = read_rows(self.data, self.train_split, self.dataset_config, self.streaming)
        splits = {}
        stream = not hasattr(train, "__len__")
        total = 0 if stream else len(train)
        for split, source in self.held_out.items():
            if isinstance(source, float):
                if stream:
                    raise ValueError(f"{split}={source}: a stream has no fractions; name a split or a file.")
                train, splits[split] = split_off(train, source * total / len(train), self.seed, split)
            elif isinstance(source, str) and has_split(self.data, source):
                splits[split] = read_rows(self.data, source, self.dataset_config)
            elif source is not None:
                splits[split] = read_rows(source, split if isinstance(source, dict) else "train", self.dataset_config)
            elif isinstance(self.data, dict) and has_split(self.data, split):
                splits[split] = read_rows(self.data, split)
        return {"train": train, **splits}

    def examples(self, split: str) -> Any:
        """The rows of a split as they are tokenised: read and transformed."""
        if self._raw is None:
            self._raw = self.read()
        rows = self._raw[split]
        for transform in self.transforms:
            rows = rows.map(transform)
        return rows

    def documents(self, split: str) -> Any:
        """A split's rows as tokens. A data module that adds columns to them overrides this."""
        return tokenized(self.examples(split), self.tokenizer, self.overlong, split, self.num_proc, **self.row_options)

    def lengths(self, documents: Any) -> list[int]:
        """Tokens of each document, for packing."""
        return [len(ids) for ids in documents.with_format("numpy")["input_ids"]]

    def token_rows(self, documents: Any, bins: list[list[int]] | None) -> TokenRows:
        """The rows that loaders read; `bins` says which documents share one."""
        return TokenRows(documents, bins, self.token_columns)

    def collate_fn(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """From rows to a batch; picklable."""
        return collator(self.tokenizer, self.pad_to_multiple_of, self.token_columns)

    def rows(self, split: str) -> Any | None:
        """The tokenised rows of "train", "validation" or "test", made once; `None` if there is no such split."""
        if self._raw is None:
            self._raw = self.read()
        if split not in self._rows and split in self._raw:
            made = self.documents(split)
            if self.packing and not hasattr(made, "__len__"):
                raise ValueError("packing=True needs all rows at hand, and data is a stream.")
            if hasattr(made, "__len__"):
                bins = None
                if self.packing and split == "train":
                    bins = best_fit_decreasing(self.lengths(made), self.max_length)
                made = self.token_rows(made, bins)
            self._rows[split] = made
        return self._rows.get(split)

    def prepare_data(self) -> None:
        # Fills datasets' cache before the other ranks look into it.
        for split in self._needed(None if self.trainer is None else self.trainer.state.fn):
            self.rows(split)

    def setup(self, stage: str | None = None) -> None:
        self._loader = self._position = None  # of an earlier fit
        for split in self._needed(stage):
            self.rows(split)

    def _needed(self, stage: Any) -> tuple[str, ...]:
        stage = getattr(stage, "value", stage)
        needed = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("test",)}
        return needed.get(stage, SPLITS)

    # -- loaders --------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> LookAheadDataLoader:
        rows = self.rows("train")
        stream = not isinstance(rows, TokenRows)
        loader = LookAheadDataLoader(
            self._stream(rows) if stream else rows,
            batch_size=self.batch_size,
            sampler=self._sampler(rows, self.shuffle) if isinstance(rows, TokenRows) else None,
            num_workers=self.num_workers,
            drop_last=self.drop_last,
            collate_fn=self.collate_fn(),
            seed=self.seed,
        )
        if self._position is not None:
            loader.load_state_dict(self._position)
            self._position = None
        self._loader = loader
        return loader

    # Lightning restores a loader's own state only if the loader is made after the loops are restored: not where
    # `configure_optimizers` asks for `trainer.estimated_stepping_batches`. A data module's comes in time.

    def state_dict(self) -> dict[str, Any]:
        return {} if self._loader is None else {"loader": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._loader is None:
            self._position = state_dict.get("loader")
        elif "loader" in state_dict:
            self._loader.load_state_dict(state_dict["loader"])

    def val_dataloader(self) -> Any:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> Any:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> Any:
        """The test rows, or the validation rows where there are none; Lightning deals them out to ranks."""
        split = "test" if self.rows("test") is not None else "validation"
        return self._evaluation_loader(split, own_order=False)

    def _evaluation_loader(self, split: str, own_order: bool = True) -> Any:
        rows = self.rows(split)
        if rows is None:
            return []
        sampler = self._sampler(rows, shuffle=False) if own_order and isinstance(rows, TokenRows) else None
        return DataLoader(
            rows,
            batch_size=self.eval_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn(),
        )

    def _sampler(self, rows: TokenRows, shuffle: bool) -> ResumableSampler:
        # Not the world size: tensor-parallel ranks see the same rows.
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return ResumableSampler(rows, shuffle=shuffle, seed=self.seed, **ranks)

    def _stream(self, rows: Any) -> Any:
        from datasets.distributed import split_dataset_by_node

        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        if ranks:
            rows = split_dataset_by_node(rows, rank=ranks["rank"], world_size=ranks["num_replicas"])
        return rows.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer) if self.shuffle else rows
