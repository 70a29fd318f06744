"""Pictures of a run: one way to draw without a screen, to write beside the checkpoints, and to hand to loggers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as L


def new_figure(width: float = 7.0, height: float = 4.0) -> tuple[Any, Any]:
    """A matplotlib figure with one axes, made without pyplot: no global state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def run_folder(trainer: L.Trainer) -> Path:
    """Where a run's files go: its checkpoints' folder, else the logger's, else `default_root_dir`."""
    checkpoint = trainer.checkpoint_callback
    logger = trainer.loggers[0] if trainer.loggers else None
    # Not `trainer.log_dir`, which is a collective call: pictures are drawn on rank zero alone.
    places = (getattr(checkpoint, "dirpath", None), getattr(logger, "log_dir", None), getattr(logger, "save_dir", None))
    return Path(next((place for place in places if place), trainer.default_root_dir))


def write_picture(trainer: L.Trainer, figure: Any, name: str, path: str | Path | None = None) -> Path:
    """Writes `figure` as a PNG and hands it to every logger that takes images; call it on rank zero.

    Args:
        trainer: The trainer.
        figure: A matplotlib figure.
        name: File name without its ending, and the key in loggers.
        path: The file; by default `{name}.png` in `run_folder`.
    """
    path = Path(path) if path is not None else run_folder(trainer) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp.png")
    figure.savefig(unfinished, dpi=120)
    unfinished.replace(path)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(name, [str(path)], step=trainer.global_step)
        elif hasattr(experiment := getattr(logger, "experiment", None), "add_figure"):  # TensorBoard
            experiment.add_figure(name, figure, global_step=trainer.global_step)
    return path
