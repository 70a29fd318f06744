"""The viewer's pages against weights computed apart; and a run with it is the run without it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_peft.callbacks import TokenWeightViewer
from lightning_peft.callbacks.token_weight_viewer import as_html, shade, token_texts
from lightning_peft.datamodules import LookAheadDataLoader
from lightning_peft.models import CausalLM, SequenceClassifier
from lightning_peft.objectives import DynamicFineTuningCausalLM
from tests.models.test_causal_lm import batch_of, quiet_trainer, rows
from tests.tiny import tiny_bert, tiny_llama, tiny_tokenizer


def run(tmp_path, viewer: list, steps: int = 4, resume: Any = None, **trainer: Any):
    torch.manual_seed(0)
    module = DynamicFineTuningCausalLM(
        tiny_llama(dropout=0.2), tokenizer=tiny_tokenizer(), learning_rate=1e-2, lr_scheduler="constant"
    )
    made = quiet_trainer(tmp_path, max_epochs=steps // 4, callbacks=viewer, **trainer)
    torch.manual_seed(0)
    loader = LookAheadDataLoader(rows(8), batch_size=2, shuffle=False, collate_fn=batch_of)
    made.fit(module, loader, ckpt_path=resume)
    return module, made


def test_weights_and_probabilities_are_those_of_each_token(tmp_path):
    viewer = TokenWeightViewer(steps=[0, 2], examples=2)
    run(tmp_path, [viewer])
    assert [page["step"] for page in viewer.pages] == [0, 2, 4]
    batch = batch_of(rows(8)[:2])
    p = tiny_llama().eval()(batch["input_ids"]).logits.softmax(-1)
    for row, (tokens, labels) in enumerate(zip(viewer.pages[0]["rows"], batch["labels"])):
        learnt = [place for place in range(1, len(labels)) if labels[place] != -100]
        first = learnt[0] - 1
        assert len(tokens) == len(labels) - first
        for place, (_, weight, probability) in enumerate(tokens, first):
            if place not in learnt:
                assert weight is probability is None
                continue
            expected = p[row, place - 1, labels[place]].item()
            assert weight == pytest.approx(expected, rel=1e-4)
            assert probability == pytest.approx(expected, rel=1e-4)


def test_a_run_with_it_is_the_run_without_it(tmp_path):
    plain, _ = run(tmp_path, [])
    seen, _ = run(tmp_path, [TokenWeightViewer(steps=[0, 1, 2, 3])])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), seen.parameters()))
    assert seen.training or not plain.training


def test_page_and_picture(tmp_path):
    from matplotlib.image import imread

    viewer = TokenWeightViewer(examples=2, path=str(tmp_path / "pages" / "look.html"))
    run(tmp_path, [viewer])
    page = (tmp_path / "pages" / "look.html").read_text()
    assert page.count("<h2>") == 2
    assert re.findall(r"<h3>step (\d+)", page) == ["0", "4"] * 2
    shown = page.count("title='weight")
    assert shown == sum(token[1] is not None for made in viewer.pages for row in made["rows"] for token in row)
    height, width, _ = imread(tmp_path / "pages" / "look.png").shape
    assert height > 200
    assert width > 300


def test_text_is_escaped_and_shades_are_in_order():
    page = {"step": 3, "rows": [[["<b>&\n", None, None], ["x", 0.5, 0.5], ["y", 2.0, 0.1]]]}
    text = as_html([page])
    assert "&lt;b&gt;&amp;⏎\n" in text
    assert "<b>" not in text
    assert shade(0.0, 2.0) == (1.0, 1.0, 1.0)
    assert shade(1.0, 2.0)[2] > shade(2.0, 2.0)[2]
    assert shade(1.0, 0.0) == (1.0, 1.0, 1.0)


def test_blanks_of_word_level_tokenizers_are_shown():
    tokenizer = tiny_tokenizer()
    assert "".join(token_texts(tokenizer, tokenizer("a cat")["input_ids"])).strip() == "a cat"
    assert token_texts(None, [5, 6]) == [" 5", " 6"]


class Tables(DummyLogger):
    """A logger that takes tables and pictures, as Weights & Biases' does."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[dict[str, Any]] = []
        self.images: list[str] = []

    def log_table(self, key: str, **kwargs: Any) -> None:
        self.tables.append({"key": key, **kwargs})

    def log_image(self, key: str, images: list[str], **kwargs: Any) -> None:
        self.images += images


def test_tables_and_pictures_go_to_the_logger(tmp_path):
    logger = Tables()
    run(tmp_path, [TokenWeightViewer(steps=[0], examples=1, path=str(tmp_path / "w.html"))], logger=logger)
    assert [table["step"] for table in logger.tables] == [0, 4]
    table = logger.tables[0]
    assert table["columns"] == ["step", "example", "position", "token", "weight", "probability"]
    assert all(len(row) == 6 for row in table["data"])
    assert logger.images == [str(tmp_path / "w.png")] * 2


def test_a_resumed_run_shows_the_same_examples(tmp_path):
    first = TokenWeightViewer(steps=[0, 5], examples=1)
    _, trainer = run(tmp_path, [first])
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    second = TokenWeightViewer(steps=[0, 5], examples=1)
    run(tmp_path, [second], steps=8, resume=tmp_path / "one.ckpt")
    assert [page["step"] for page in second.pages] == [0, 4, 5, 8]
    texts = {tuple(token[0] for token in page["rows"][0]) for page in second.pages}
    assert len(texts) == 1
    assert second.pages[:2] == first.pages


def test_where_it_has_nothing_to_show_it_says_so(tmp_path):
    loader = LookAheadDataLoader(rows(4), batch_size=2, collate_fn=batch_of)
    with pytest.raises(ValueError, match="nothing weighs tokens"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[TokenWeightViewer()]).fit(CausalLM(tiny_llama()), loader)
    with pytest.raises(ValueError, match="SequenceClassifier is none"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[TokenWeightViewer()]).fit(
            SequenceClassifier(tiny_bert()), loader
        )
    for kwargs, message in (
        ({"steps": [-1]}, r"steps=\[-1\]"),
        ({"examples": 0}, "examples=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenWeightViewer(**kwargs)
