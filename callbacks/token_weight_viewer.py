"""What each token weighs in the loss: a few fixed examples, their tokens shaded by weight, at chosen steps."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_peft.models.causal_lm import CausalLM
from lightning_peft.pictures import run_folder, write_picture

#: One token of a page: its text, its weight and its probability; the last two are None where nothing is learnt.
Token = list[Any]
COLUMNS = ["step", "example", "position", "token", "weight", "probability"]


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token reads, blanks kept; ids where there is no tokenizer."""
    if tokenizer is None:
        return [f" {token}" for token in ids]
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    joined = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # Word-level tokenizers put blanks between tokens that no token holds.
    return texts if "".join(texts) == joined or " ".join(texts) != joined else [f"{text} " for text in texts]


def shade(weight: float, largest: float) -> tuple[float, float, float]:
    """White at 0 to a deep orange at the largest weight; red, green and blue in [0, 1]."""
    part = 0.0 if largest <= 0 else min(max(weight / largest, 0.0), 1.0)
    return 1.0, 1.0 - 0.45 * part, 1.0 - 0.9 * part


class TokenWeightViewer(L.Callback):
    """Shows how token-weighting objectives weigh a few examples, the first of the run, at chosen optimizer steps.

    Writes `token_weights.html` (point at a token for its weight and probability) and `token_weights.png`, every chosen
    step so far under each example, and hands the picture and a table to loggers that take them. Examples and pages are
    in the checkpoint: a resumed run shows the same. The pass is made in evaluation mode and changes nothing in the run.

    Args:
        steps: Optimizer steps before which to look; 0 is before the first. The end of training is always shown.
        examples: How many rows of the first training batch (packed rows in whole).
        max_tokens: Tokens of a row that are shown, from the one before the first learnt token on.
        path: The page; by default `token_weights.html` beside the checkpoints. The picture stands beside it.

    Raises:
        ValueError: An argument is out of range, the module is no `CausalLM`, or nothing in it weighs tokens.
    """

    def __init__(
        self, steps: list[int] | None = None, examples: int = 3, max_tokens: int = 200, path: str | None = None
    ) -> None:
        steps = [0] if steps is None else steps
        if any(step < 0 for step in steps):
            raise ValueError(f"steps={steps} must be at least 0.")
        for what, value in {"examples": examples, "max_tokens": max_tokens}.items():
            if value < 1:
                raise ValueError(f"{what}={value} must be at least 1.")
        self.steps, self.examples, self.max_tokens, self.path = sorted(set(steps)), examples, max_tokens, path
        self.pages: list[dict[str, Any]] = []  # {"step": ..., "rows": [[[text, weight, probability], ...], ...]}
        self._batch: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(steps=self.steps, path=self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"pages": self.pages, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pages, self._batch = state_dict["pages"], state_dict["batch"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, CausalLM):
            raise ValueError(
                f"TokenWeightViewer shows the token weights of a CausalLM, and {type(pl_module).__name__} is none."
            )

    # -- looking --------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._batch is None:
            batch = batch if "step_counts" in batch else pl_module.transform_batch(batch)  # type: ignore[operator]
            self._batch = first_rows(batch, self.examples)
        seen = {page["step"] for page in self.pages}
        if trainer.global_step in self.steps and trainer.global_step not in seen:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._batch is None:
            return
        if not self.pages or self.pages[-1]["step"] != trainer.global_step:
            self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert self._batch is not None
        batch = {k: v.to(pl_module.device) if isinstance(v, Tensor) else v for k, v in self._batch.items()}
        training = [module for module in pl_module.modules() if module.training]
        pl_module.eval()
        try:
            # On every rank: under FSDP2 all take part in a forward.
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                counts = {name: torch.ones((), device=pl_module.device) for name in pl_module.counts(batch)}
                terms = pl_module.terms(batch, counts)
        finally:
            for module in training:
                module.training = True
        if terms.weights is None:
            raise ValueError(
                "TokenWeightViewer: nothing weighs tokens in this module. Add an objective that does, such as "
                "DynamicFineTuningMixin, or leave the viewer out."
            )
        rows = self._rows(pl_module, batch, terms)
        self.pages.append({"step": trainer.global_step, "rows": rows})
        if trainer.is_global_zero:
            self._write(trainer)

    def _rows(self, pl_module: Any, batch: dict[str, Any], terms: Any) -> list[list[Token]]:
        ids, shape = batch["input_ids"].cpu(), batch["labels"].shape
        weights, probabilities = (torch.full((shape.numel(),), torch.nan) for _ in range(2))
        places = terms.units.index.cpu()
        weights[places] = terms.weights.float().cpu()
        probabilities[places] = terms.units.nll.neg().exp().float().cpu()
        real = (batch["document_ids"] >= 0 if "document_ids" in batch else batch["attention_mask"].bool()).cpu()
        rows = []
        for own, weight, p, kept in zip(ids, weights.view(shape), probabilities.view(shape), real):
            learnt = (~weight.isnan()).nonzero().flatten()
            begin = max(int(learnt[0]) - 1, 0) if len(learnt) else 0
            shown = [place for place in range(begin, len(own)) if kept[place]][: self.max_tokens]
            texts = token_texts(pl_module.tokenizer, own[shown].tolist())
            values = [[None if x.isnan() else float(x) for x in (weight[place], p[place])] for place in shown]
            rows.append([[text, *pair] for text, pair in zip(texts, values)])
        return rows

    # -- showing --------------------------------------------------------------------------------------------------

    def _write(self, trainer: L.Trainer) -> None:
        page = Path(self.path) if self.path is not None else run_folder(trainer) / "token_weights.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        unfinished = page.with_suffix(".tmp.html")
        unfinished.write_text(as_html(self.pages), encoding="utf-8")
        unfinished.replace(page)
        write_picture(trainer, as_figure(self.pages), "token_weights", page.with_suffix(".png"))
        table = as_table(self.pages[-1])
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):  # Weights & Biases
                logger.log_table("token_weights", columns=COLUMNS, data=table, step=trainer.global_step)
            elif hasattr(experiment := getattr(logger, "experiment", None), "add_text"):  # TensorBoard
                lines = ["|".join(COLUMNS), "|".join("---" for _ in COLUMNS)]
                lines += ["|".join(_cell(value) for value in row) for row in table]
                experiment.add_text("token_weights", "\n".join(lines), trainer.global_step)


def first_rows(batch: dict[str, Any], n: int) -> dict[str, Any]:
    """The first n rows of a batch, on the CPU; what the loader counted is left out."""
    size = len(batch["labels"])
    return {
        name: value[:n].detach().cpu().clone() if isinstance(value, Tensor) else value[:n]
        for name, value in batch.items()
        if isinstance(value, (Tensor, list)) and len(value) == size
    }


def largest_weight(pages: list[dict[str, Any]]) -> float:
    """Of all tokens at all steps: what the darkest shade stands for."""
    weights = [token[1] for page in pages for row in page["rows"] for token in row if token[1] is not None]
    return max(weights, default=0.0)


def as_table(page: dict[str, Any]) -> list[list[Any]]:
    """A page's learnt tokens as rows of `COLUMNS`."""
    return [
        [page["step"], example, position, text, weight, p]
        for example, row in enumerate(page["rows"])
        for position, (text, weight, p) in enumerate(row)
        if weight is not None
    ]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("\n", "⏎").replace("|", "\\|")


def as_html(pages: list[dict[str, Any]]) -> str:
    """All pages as one document that needs nothing else."""
    largest = largest_weight(pages)
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Token weights</title>",
        "<style>body{font:15px/1.9 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}",
        "pre{white-space:pre-wrap;font:13px/1.9 monospace;margin:.2em 0 1em}span{border-radius:2px;padding:2px 0}",
        ".off{color:#999}h2{margin:1.6em 0 .2em}h3{margin:.6em 0 0;font-weight:normal;color:#555}</style>",
        f"<h1>Token weights</h1><p>White is 0, the darkest shade {largest:.3g}; grey tokens are not learnt.</p>",
    ]
    for example in range(max(len(page["rows"]) for page in pages)):
        parts.append(f"<h2>Example {example + 1}</h2>")
        for page in pages:
            parts.append(f"<h3>step {page['step']}</h3><pre>")
            for text, weight, p in page["rows"][example] if example < len(page["rows"]) else []:
                shown = html.escape(text).replace("\n", "⏎\n")
                if weight is None:
                    parts.append(f"<span class='off'>{shown}</span>")
                    continue
                colour = ",".join(str(round(255 * value)) for value in shade(weight, largest))
                told = f"weight {weight:.4g}, p {p:.4g}"
                parts.append(f"<span style='background:rgb({colour})' title='{told}'>{shown}</span>")
            parts.append("</pre>")
    return "\n".join(parts[:5]) + "".join(parts[5:])


def as_figure(pages: list[dict[str, Any]], width: int = 88) -> Any:
    """All pages as one matplotlib figure, `width` characters a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    largest = largest_weight(pages)
    cells: list[tuple[float, float, str, Any]] = []  # column, line, text, and its shade or None
    line = 0.0
    for example in range(max(len(page["rows"]) for page in pages)):
        cells.append((0, line, f"Example {example + 1}", "title"))
        line += 1.4
        for page in pages:
            cells.append((0, line, f"step {page['step']}", "step"))
            line += 1.1
            column = 0
            for text, weight, _ in page["rows"][example] if example < len(page["rows"]) else []:
                colour = None if weight is None else shade(weight, largest)
                *lines, last = text.expandtabs(4).split("\n")
                for piece, ends in [(part + "⏎", True) for part in lines] + [(last, False)]:
                    while piece:
                        if column and column + len(piece) > width:
                            column, line = 0, line + 1
                        cells.append((column, line, piece[:width], colour))
                        column, piece = column + len(piece[:width]), piece[width:]
                    if ends:
                        column, line = 0, line + 1
            line += 1.5
        line += 0.5
    used = max([46.0] + [column + len(text) for column, _, text, _ in cells])
    inch, high = 0.0686, 0.19  # of a character of DejaVu Sans Mono at 8.2 points, and of a line
    figure = Figure(figsize=((used + 4) * inch, (line + 3) * high))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-2, used + 2), ylim=(line + 0.5, -2.5))
    axes.axis("off")
    styles: dict[Any, dict[str, Any]] = {
        "title": {"family": "sans-serif", "color": "black", "fontsize": 10},
        "step": {"family": "sans-serif", "color": "0.4", "fontsize": 8.5},
        None: {"family": "monospace", "color": "0.6", "fontsize": 8.2},  # not learnt
    }
    for x, y, text, kind in cells:
        if isinstance(kind, tuple):
            axes.add_patch(Rectangle((x, y - 0.5), len(text), 1, facecolor=kind, edgecolor="white", linewidth=0.6))
        style = styles.get(kind, {**styles[None], "color": "black"})
        bare = text.lstrip()  # matplotlib draws no blanks in front
        axes.text(x + len(text) - len(bare), y, bare, va="center", parse_math=False, **style)
    steps, right = 20, used - 6  # what the shades stand for, at the top right
    for i in range(steps):
        axes.add_patch(Rectangle((right - steps + i, -2), 1, 0.8, facecolor=shade(i / (steps - 1), 1.0)))
    style = {"va": "center", "fontsize": 8.5, "color": "0.4"}
    axes.text(right - steps - 1, -1.6, "weight 0", ha="right", **style)
    axes.text(right + 1, -1.6, f"{largest:.3g}", ha="left", **style)
    return figure
