"""Labelled images from anywhere, as batches for an `ImageClassifier`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_peft.datamodules.class_pair_sampler import ClassPairs, ClassPairSampler
from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from lightning_peft.datamodules.resumable_sampler import RepeatedIndex, ResumableSampler
from lightning_peft.datamodules.sources import Source, has_split, read_rows, split_off

IGNORED = -100


def image_tensor(image: Any, channels: int) -> Tensor:
    """[channels, height, width] in [0, 1], from a PIL image, or an array or nested lists of bytes.

    Args:
        image: [height, width] grey, or [height, width, channels]; of PIL any mode.
        channels: 1 or 3.
    """
    if hasattr(image, "convert"):
        image = image.convert("L" if channels == 1 else "RGB")
    pixels = torch.as_tensor(np.asarray(image, dtype=np.float32)) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return pixels.mean(0, keepdim=True) if channels == 1 else pixels.expand(3, -1, -1)


def random_crop(height: int, width: int, least: float, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop with a share in [least, 1] of the area and sides of 3 to 4 up to 4 to 3.

    Args:
        height: Of the image.
        width: Of the image.
        least: Least share of the area.
        generator: Where the numbers come from.
    """
    for share, ratio, y, x in torch.rand(10, 4, generator=generator).tolist():
        area = height * width * (least + (1 - least) * share)
        aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    return middle(height, width)


def middle(height: int, width: int) -> tuple[int, int, int, int]:
    """The largest square in the middle."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def long_tailed(labels: Sequence[int], ratio: float) -> list[int]:
    """Rows of a long-tailed part: class c keeps its first n ratio^(-c / (K - 1)), n the fewest rows of a class.

    Args:
        labels: Class of each row.
        ratio: How many times rarer the last class is than class 0.
    """
    own = torch.as_tensor(labels)
    rows = [(own == c).nonzero().flatten().tolist() for c in range(int(own.max()) + 1)]
    fewest = min(len(r) for r in rows)
    kept = [round(fewest * ratio ** (-c / max(len(rows) - 1, 1))) for c in range(len(rows))]
    return sorted(row for r, n in zip(rows, kept) for row in r[: max(n, 1)])


class ImageRows(Dataset):
    """Images as tensors; augmented by numbers that depend on the seed, the epoch and the row alone.

    Args:
        rows: A `datasets.Dataset`, or a list of rows.
        size: Side of the square image that comes out.
        channels: 1 or 3.
        mean: Subtracted from [0, 1], one for each channel or one for all.
        std: Then divided by.
        crop: Least share of the area of a random crop; None takes the middle square.
        flip: Mirror half of the images.
        seed: Seed of crops and mirrors.
        columns: Names of the columns with the image and the class.
    """

    def __init__(
        self,
        rows: Any,
        size: int,
        channels: int = 3,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        crop: float | None = None,
        flip: bool = False,
        seed: int = 0,
        columns: tuple[str, str] = ("image", "label"),
    ) -> None:
        self.rows, self.size, self.channels, self.crop, self.flip = rows, size, channels, crop, flip
        self.mean, self.std = (torch.tensor(list(values))[:, None, None] for values in (mean, std))
        self.seed, self.epoch, self.columns = seed, 0, columns

    def set_epoch(self, epoch: int) -> None:
        """The epoch that crops are drawn for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[int(index)]
        image = image_tensor(row[self.columns[0]], self.channels)
        own = (self.seed * 1_000_003 + self.epoch) * 1_000_003 + int(index)
        generator = torch.Generator().manual_seed(own % 2**63)
        height, width = image.shape[1:]
        place = middle(height, width) if self.crop is None else random_crop(height, width, self.crop, generator)
        top, left, height, width = place
        image = image[:, top : top + height, left : left + width]
        if image.shape[1:] != (self.size, self.size):
            resized = F.interpolate(image[None], (self.size, self.size), mode="bilinear", antialias=True)
            image = resized.squeeze(0)
        if self.flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(2)
        # A row that only fills up a rank's last batch counts for nothing.
        label = IGNORED if isinstance(index, RepeatedIndex) else row.get(self.columns[1], IGNORED)
        return {"pixel_values": ((image - self.mean) / self.std).contiguous(), "labels": torch.tensor(int(label))}


class ImageData(L.LightningDataModule):
    """Images with their classes.

    Args:
        data: A hub name, a folder of class folders, a list of rows, a dictionary of splits, or a data set of the
            `datasets` library; "digits" for the 1,797 digits of 8 x 8 that scikit-learn carries.
        validation: The same, or a split's name, or a fraction of the training rows to hold out.
        test: As `validation`.
        train_split: The split of `data` to train on.
        image_column: The column of images: PIL, or arrays and nested lists of bytes.
        label_column: The column of class indices.
        image_size: Side of the square images that come out.
        channels: 1 (grey) or 3.
        image_mean: Subtracted from pixels in [0, 1], for each channel or for all.
        image_std: Then divided by.
        crop: Least share of the area of a random crop in training; by default the middle square.
        flip: Mirror half of the training images.
        imbalance: Keep a long-tailed part of the training rows, with the last class so many times rarer than the first.
        class_pairs: Draw pairs of classes to be mixed (for `SelectiveMixup`).
        unlabelled: Rows of which the second of a pair comes; by default the training rows.
        pairs: Pairs in an epoch; by default as many as there are training rows.
        batch_size: Rows (or pairs) in a batch, on each rank.
        eval_batch_size: The same for validation and test; by default `batch_size`.
        shuffle: Shuffle the training rows every epoch.
        seed: Seed of the order, of crops, of pairs and of fractions held out.
        num_workers: Processes that load batches.

    Raises:
        ValueError: An argument is out of range, or a split is empty.
    """

    def __init__(
        self,
        data: Source = "digits",
        validation: float | Source | None = None,
        test: float | Source | None = None,
        train_split: str = "train",
        image_column: str = "image",
        label_column: str = "label",
        image_size: int = 224,
        channels: int = 3,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        crop: float | None = None,
        flip: bool = False,
        imbalance: float | None = None,
        class_pairs: bool = False,
        unlabelled: Source | None = None,
        pairs: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for what, least in {"image_size": 1, "batch_size": 1, "num_workers": 0}.items():
            if locals()[what] < least:
                raise ValueError(f"{what}={locals()[what]} must be at least {least}.")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} must be 1 (grey) or 3 (colours).")
        if crop is not None and not 0 < crop <= 1:
            raise ValueError(f"crop={crop} must be a share of the area in (0, 1], or None.")
        if imbalance is not None and not imbalance >= 1:
            raise ValueError(
                f"imbalance={imbalance} must be at least 1 (as many rows of the last class as of the first)."
            )
        if unlabelled is not None and not class_pairs:
            raise ValueError("unlabelled rows are partners in pairs: set class_pairs=True.")
        self.data, self.held_out, self.train_split = data, {"test": test, "validation": validation}, train_split
        self.columns = (image_column, label_column)
        self.options = {
            "size": image_size,
            "channels": channels,
            "mean": image_mean or [0.5],
            "std": image_std or [0.5],
            "seed": seed,
            "columns": self.columns,
        }
        self.augmentation = {"crop": crop, "flip": flip}
        self.imbalance, self.class_pairs, self.unlabelled, self.pairs = imbalance, class_pairs, unlabelled, pairs
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.shuffle, self.seed, self.num_workers = shuffle, seed, num_workers
        self._rows: dict[str, Any] = {}

    # -- rows -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        if self._rows:
            return
        data = scikit_digits() if isinstance(self.data, str) and self.data == "digits" else self.data
        train = read_rows(data, self.train_split)
        total = len(train)
        for split, source in self.held_out.items():
            if isinstance(source, float):
                train, self._rows[split] = split_off(train, source * total / len(train), self.seed, split)
            elif isinstance(source, str) and has_split(data, source):
                self._rows[split] = read_rows(data, source)
            elif source is not None:
                self._rows[split] = read_rows(source, split if isinstance(source, dict) else "train")
            elif isinstance(data, dict) and has_split(data, split):
                self._rows[split] = read_rows(data, split)
        missing = [name for name in self.columns if name not in train.column_names]
        if missing:
            raise ValueError(
                f"rows have the columns {train.column_names} and not {missing}: set image_column and label_column."
            )
        if self.imbalance is not None:
            train = train.select(long_tailed(train[self.columns[1]], self.imbalance))
        self._rows["train"] = train
        if self.unlabelled is not None:
            self._rows["unlabelled"] = read_rows(self.unlabelled, "train")

    def labels(self, split: str = "train") -> list[int]:
        """The classes of a split's rows."""
        return list(self._rows[split][self.columns[1]])

    # -- loaders --------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> LookAheadDataLoader:
        rows: Any = ImageRows(self._rows["train"], **self.options, **self.augmentation)  # type: ignore[arg-type]
        sampler: ResumableSampler
        if self.class_pairs:
            unlabelled = self._rows.get("unlabelled")
            partners = None
            if unlabelled is not None:
                partners = ImageRows(unlabelled, **self.options, **self.augmentation)  # type: ignore[arg-type]
            classes = torch.full((0,), IGNORED) if partners is not None else None  # the network is to say
            sampler = ClassPairSampler(self.labels(), classes, self.pairs, self.seed, **self._ranks())
            rows = ClassPairs(rows, partners)
        else:
            sampler = ResumableSampler(rows, shuffle=self.shuffle, seed=self.seed, **self._ranks())
        return LookAheadDataLoader(
            rows, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers, seed=self.seed
        )

    def val_dataloader(self) -> Any:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> Any:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> Any:
        """The test rows, or the validation rows where there are none; Lightning deals them out to ranks."""
        return self._evaluation_loader("test" if "test" in self._rows else "validation", own_order=False)

    def _evaluation_loader(self, split: str, own_order: bool = True) -> Any:
        if split not in self._rows:
            return []
        rows = ImageRows(self._rows[split], **self.options)  # type: ignore[arg-type]
        sampler = ResumableSampler(rows, shuffle=False, **self._ranks()) if own_order else None
        return DataLoader(rows, batch_size=self.eval_batch_size, sampler=sampler, num_workers=self.num_workers)

    def _ranks(self) -> dict[str, Any]:
        # Not the world size: tensor-parallel ranks see the same rows.
        return (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}


def scikit_digits() -> list[dict[str, Any]]:
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("data='digits' reads scikit-learn's digits: pip install scikit-learn.") from error
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [{"image": image.tolist(), "label": int(label)} for image, label in zip(images, digits.target)]
