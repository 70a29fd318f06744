"""Images to batches: pixels by hand, crops by seed and epoch, long tails, splits, pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_peft.datamodules import ClassPairSampler, ImageData
from lightning_peft.datamodules.image_data import ImageRows, image_tensor, long_tailed, random_crop
from lightning_peft.datamodules.resumable_sampler import RepeatedIndex


def rows(n: int = 12, height: int = 6, width: int = 8) -> list[dict]:
    images = np.random.default_rng(0).integers(0, 256, (n, height, width))
    return [{"image": image.tolist(), "label": i % 3} for i, image in enumerate(images)]


def test_pixels_of_every_kind_of_image():
    from PIL import Image

    grey = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    colours = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = torch.from_numpy(grey).float()[None] / 255
    for image in (grey, grey.tolist(), Image.fromarray(grey)):
        torch.testing.assert_close(image_tensor(image, 1), expected)
        torch.testing.assert_close(image_tensor(image, 3), expected.expand(3, -1, -1))
    expected = torch.from_numpy(colours).float().permute(2, 0, 1) / 255
    for image in (colours, Image.fromarray(colours)):
        torch.testing.assert_close(image_tensor(image, 3), expected)
    assert image_tensor(colours, 1).shape == (1, 5, 7)


def test_evaluation_takes_the_middle_square():
    made = ImageRows(rows(), size=6, channels=1, mean=[0.2], std=[0.4])[2]
    image = torch.tensor(rows()[2]["image"]).float()[None] / 255
    torch.testing.assert_close(made["pixel_values"], (image[:, :, 1:7] - 0.2) / 0.4)
    assert int(made["labels"]) == 2
    smaller = ImageRows(rows(), size=3, channels=1, mean=[0.0], std=[1.0])[2]["pixel_values"]
    expected = F.interpolate(image[None, :, :, 1:7], (3, 3), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(smaller, expected)


def test_crops_depend_on_seed_epoch_and_row_alone():
    def pixels(epoch: int, seed: int = 0) -> list[torch.Tensor]:
        own = ImageRows(rows(height=40, width=50), size=5, channels=1, crop=0.4, flip=True, seed=seed)
        own.set_epoch(epoch)
        return [own[i]["pixel_values"] for i in range(12)]

    first = pixels(0)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, pixels(0)))
    assert not any(torch.equal(a, b) for a, b in zip(first, pixels(1)))
    assert not any(torch.equal(a, b) for a, b in zip(first, pixels(0, seed=1)))


def test_crops_have_the_shares_and_ratios_they_say():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        top, left, height, width = random_crop(60, 80, 0.4, generator)
        assert 0 <= top <= top + height <= 60
        assert 0 <= left <= left + width <= 80
        assert 0.39 < height * width / (60 * 80) <= 1
        assert 0.73 < width / height < 1.37
    assert random_crop(4, 100, 1.0, generator) == (0, 48, 4, 4)  # no such crop fits: the middle


def test_a_repeated_row_counts_for_nothing():
    assert int(ImageRows(rows(), size=6, channels=1)[RepeatedIndex(1)]["labels"]) == -100


def test_long_tails():
    labels = [i % 5 for i in range(500)]
    kept = long_tailed(labels, 16)
    assert np.bincount([labels[i] for i in kept]).tolist() == [100, 50, 25, 12, 6]
    assert kept == sorted(kept)


def test_splits_and_loaders():
    data = ImageData(rows(30), validation=0.2, test=rows(4), image_size=6, channels=1, batch_size=4)
    data.setup()
    assert [len(data.labels(split)) for split in ("train", "validation", "test")] == [24, 6, 4]
    batch = next(iter(data.train_dataloader()))
    assert batch["pixel_values"].shape == (4, 1, 6, 6)
    assert sum(len(b["labels"]) for b in data.val_dataloader()) == 6
    assert sum(len(b["labels"]) for b in data.predict_dataloader()) == 4
    assert ImageData(rows()).val_dataloader() == []


def test_pairs_with_partners_of_their_own():
    data = ImageData(rows(30), unlabelled=rows(7), class_pairs=True, image_size=6, channels=1, batch_size=4, pairs=8)
    data.setup()
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, ClassPairSampler)
    loader.sampler.set_pairs(torch.ones(3, 3), partner_labels=torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    batches = list(loader)
    assert len(batches) == 2
    assert batches[0]["partner_pixel_values"].shape == (4, 1, 6, 6)


def test_digits_of_scikit_learn():
    pytest.importorskip("sklearn")
    data = ImageData("digits", validation=0.2, imbalance=10.0, image_size=8, channels=1, batch_size=16)
    data.setup()
    counts = np.bincount(data.labels())
    assert counts[9] == round(counts[0] / 10)
    assert (np.diff(counts) <= 0).all()
    batch = next(iter(data.val_dataloader()))
    assert batch["pixel_values"].shape == (16, 1, 8, 8)
    assert float(batch["pixel_values"].max()) == 1


def test_bad_arguments_name_themselves():
    for given, message in {
        ("channels", 2): "channels=2",
        ("crop", 0.0): "crop=0.0",
        ("imbalance", 0.5): "imbalance=0.5",
        ("image_size", 0): "image_size=0",
        ("batch_size", 0): "batch_size=0",
        ("unlabelled", ()): "class_pairs=True",
    }.items():
        with pytest.raises(ValueError, match=message):
            ImageData(rows(), **dict([given]))
    with pytest.raises(ValueError, match="image_column"):
        ImageData(rows(), image_column="picture").setup()
