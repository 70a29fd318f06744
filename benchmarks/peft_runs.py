"""Runs of fine-tuning methods to compare: the same rows, order and number of steps, each in a process of its own.

A run trains SmolLM2-135M for some steps on docstring-to-body pairs of Python's standard library and measures

    loss       held-out nats a token
    word       exact match of the body's first word: the share of held-out functions where indentation and first word
               (`return`, `self`, `if`, ...) are right, each token given the right ones before it, which is when greedy
               decoding writes just that
    line       the same of the first line, up to its end; after few steps hardly one is right, and no whole body is
    token      share of held-out tokens that are right
    s/step     median over the steps after the first; other processes slow it down, `step_cost` compares in turns
    peak MB    resident memory at its worst in a training step, above what it was before the network was loaded: its
               weights, gradients, optimizer state, activations
    trained    weights that train
    saved MB   what has to be kept: an adapter in PEFT's format, else a delta checkpoint's weights

Learning rates are each method's own, of a coarse look at a few on seed 9, not tuned: a gap of a few hundredths of a nat
between two methods says nothing, and methods that start from a random prompt or prefix need more steps than these.

A method that the network cannot take has the reason in its row. Results go to a file, and what is there already is not
run again: a table can be made in pieces.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
from step_cost import SMOLLM2, resident, warnings_off

from lightning_peft.callbacks import (
    PEFT,
    BitFit,
    DeltaCheckpoint,
    HalfFineTuning,
    KaSA,
    LayerFreezing,
    LoKI,
    SliceFine,
)
from lightning_peft.datamodules import StandardLibraryCode
from lightning_peft.export import export
from lightning_peft.models import CausalLM
from lightning_peft.pictures import new_figure

LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
BOTTLENECK = {"form": "parallel", "position": "ffn", "bottleneck": 32, "scale": 4.0}
#: Of general ability, for LoKI's scores; few, so that scoring takes seconds.
GENERAL = [
    "The capital of France is",
    "Two plus three equals",
    "Water freezes at a temperature of zero degrees",
    "The opposite of hot is",
]


class Method(NamedTuple):
    """Its learning rate, and what makes its callbacks."""

    rate: float
    callbacks: Callable[[], list[L.Callback]]


def _adapter(rate: float, config: dict[str, Any], **arguments: Any) -> Method:
    return Method(rate, lambda: [PEFT(config, **arguments)])


METHODS: dict[str, Method] = {
    "untuned": Method(0.0, list),
    "full": Method(1e-4, list),
    "HalfFineTuning": Method(2e-4, lambda: [HalfFineTuning(train_embeddings=False)]),
    "L-EO": Method(1e-3, lambda: [LayerFreezing(["embeddings", "head"])]),
    "L-LDB": Method(5e-4, lambda: [LayerFreezing(["last_block"])]),
    "BitFit": Method(1e-3, lambda: [BitFit()]),
    "SliceFine r=8": Method(1e-3, lambda: [SliceFine(rank=8, interval=4)]),
    "LoKI q=10": Method(1e-3, lambda: [LoKI(10.0, questions=GENERAL)]),
    "LoRA r=8": _adapter(1e-3, LORA),
    "LoRA, attention": _adapter(1e-3, {**LORA, "target_modules": ATTENTION}),
    "LoRA, early half": _adapter(1e-3, {**LORA, "target_modules": LINEAR, "layers_to_transform": list(range(15))}),
    "LoRA, late half": _adapter(1e-3, {**LORA, "target_modules": LINEAR, "layers_to_transform": list(range(15, 30))}),
    "QLoRA r=8": _adapter(1e-3, LORA, quantization_config=NF4),
    # Truncated, this network is at 6.7 from 2.5 before the first step: its value matrices have a flat spectrum.
    "KaSA r=8": Method(1e-3, lambda: [KaSA(r=8, target_modules=["q_proj", "v_proj"])]),
    "IA3": _adapter(1e-2, {"peft_type": "IA3", **IA3}),
    "bottleneck": _adapter(3e-4, {"peft_type": "BOTTLENECK", **BOTTLENECK}),
    "prefix tuning": _adapter(1e-1, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 20}),
    "prompt tuning": _adapter(1e-1, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20}),
}


class Functions(StandardLibraryCode):
    """Short functions: so many to train on, evenly over the library, and always the same ones held out.

    Args:
        examples: Training rows.
        held_out: Held-out rows, evenly over the held-out modules.
        seed: Seed of the order.
    """

    def __init__(self, examples: int, held_out: int, seed: int = 0) -> None:
        super().__init__(max_chars=400, max_length=160, batch_size=4, eval_batch_size=8, seed=seed)
        self.sizes = {"train": examples, "validation": held_out}

    def read(self) -> dict[str, Any]:
        rows = super().read()
        return {
            split: rows[split].select([i * len(rows[split]) // n for i in range(min(n, len(rows[split])))])
            for split, n in self.sizes.items()
        }


def beginnings(outputs: Any, batch: Any, text: Callable[[int], str]) -> list[tuple[bool, bool]]:
    """For each row, whether its first word and its first line that is not blank are predicted, with what is before.

    Args:
        outputs: What `CausalLM.validation_step` returned.
        batch: Its batch, labels [batch, time].
        text: The text of a token.
    """
    units, time_ = outputs["terms"].units, batch["labels"].shape[1]
    rows: dict[int, list[tuple[str, bool]]] = {}
    for place, label, hit in zip(units.index.tolist(), units.labels.tolist(), units.is_argmax.tolist()):
        rows.setdefault(place // time_, []).append((text(label), bool(hit)))
    made = []
    for tokens in rows.values():
        written, word, line = "", True, True
        for piece, hit in tokens:
            if not written.strip():
                word = word and hit
            if "\n" in written.lstrip():
                break
            line = line and hit
            written += piece
        made.append((word, line))
    return made


class _Watch(L.Callback):
    """Seconds of the steps, peak memory of the training, and how bodies begin in the validation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak, self.trained = 0, 0
        self.begun: list[tuple[bool, bool]] = []
        self._texts: dict[int, str] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.peak = resident("VmHWM")

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        def text(token: int) -> str:
            if token not in self._texts:
                self._texts[token] = pl_module.tokenizer.decode([token])
            return self._texts[token]

        self.begun += beginnings(outputs, batch, text)


def measure(name: str, examples: int, steps: int, held_out: int, seed: int, rate: float) -> dict[str, Any]:
    """One run, in this process.

    Args:
        name: One of `METHODS`.
        examples: Training rows.
        steps: Optimizer steps of 4 rows.
        held_out: Held-out rows.
        seed: Seed of the order and of what is drawn.
        rate: Learning rate.
    """
    before = resident("VmRSS")
    L.seed_everything(seed, verbose=False)
    module = CausalLM(SMOLLM2, learning_rate=rate, warmup_steps=min(2, steps - 1))
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()  # else the file it was read from counts as long as one is left
    watch, callbacks = _Watch(), METHODS[name].callbacks()
    with tempfile.TemporaryDirectory() as folder:
        saver = DeltaCheckpoint(folder, "delta", save_weights_only=True, every_n_train_steps=steps)
        adapter = any(isinstance(callback, PEFT) for callback in callbacks)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=not adapter and rate > 0,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*callbacks, watch, *([] if adapter or not rate else [saver])],
        )
        data = Functions(examples, held_out, seed)
        if rate:
            try:
                trainer.fit(module, data)
            except ValueError as refusal:
                return {"refused": str(refusal)}
            if adapter:
                export(module, f"{folder}/adapter")
            kept = sum(
                path.stat().st_size for path in Path(folder).rglob("*") if path.suffix in (".ckpt", ".safetensors")
            )
    trainer.limit_val_batches = 1.0
    logged = trainer.validate(module, data, verbose=False)[0]
    word, line = (sum(column) / len(watch.begun) for column in zip(*watch.begun))
    made = {"loss": logged["val_loss"], "word": word, "line": line, "token": logged["val_accuracy"]}
    if not rate:
        return made
    return made | {
        "seconds": statistics.median(watch.seconds[1:] or watch.seconds),
        "peak": (watch.peak - before) / 2**20,
        "trained": watch.trained,
        "saved": kept / 2**20,
    }


def _child(pipe: Any, *arguments: Any) -> None:
    # Freed memory goes back at once, so that the resident set is what is in use.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    warnings_off()
    import datasets

    datasets.disable_progress_bars()
    pipe.send(measure(*arguments))


def results_of(
    names: Iterable[str],
    sizes: Iterable[int],
    options: argparse.Namespace,
) -> dict[tuple[str, int], dict[str, Any]]:
    """The result of each method at each number of training rows, from the file or from a new process.

    Args:
        names: Of `METHODS`.
        sizes: Numbers of training rows.
        options: Of `parser`.
    """
    path = Path(options.results)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    made = {}
    for name in names:
        for size in sizes:
            rate = METHODS[name].rate if options.rate is None else options.rate
            key = [name, 0 if name == "untuned" else size, options.steps, options.held_out, options.seed, rate]
            found = next((row["result"] for row in known if row["run"] == key), None)
            if found is None and not options.draw_only:
                ours, theirs = multiprocessing.get_context("spawn").Pipe()
                arguments = (theirs, name, size, *key[2:])
                process = multiprocessing.get_context("spawn").Process(target=_child, args=arguments)
                process.start()
                theirs.close()
                found = ours.recv()
                process.join()
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps({"run": key, "result": found}) + "\n")
                known.append({"run": key, "result": found})
            if found is not None:
                made[name, size] = found
    return made


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that both benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--steps", type=int, default=12, help="optimizer steps of a run, 4 functions each")
    made.add_argument("--held-out", type=int, default=96, help="held-out functions")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--rate", type=float, help="learning rate in place of each method's own")
    made.add_argument("--only", nargs="+", choices=list(METHODS), help="these methods alone")
    made.add_argument("--results", default="outputs/peft_runs.jsonl", help="where results are kept and looked up")
    made.add_argument("--draw-only", action="store_true", help="run nothing: table and picture of what is there")
    return made


def table(made: dict[str, dict[str, Any]]) -> str:
    """Everything that was measured, a line a method."""
    heads = f"{'loss':>8}{'word':>7}{'line':>7}{'token':>7}{'s/step':>8}{'peak MB':>9}{'trained':>13}{'saved MB':>10}"
    lines = [f"{'':18}{heads}"]
    for name, one in made.items():
        if "refused" in one:
            lines.append(f"{name:18}     n/a: {one['refused']}")
            continue
        line = f"{name:18}{one['loss']:8.4f}{one['word']:7.3f}{one['line']:7.3f}{one['token']:7.3f}"
        if "peak" in one:
            line += f"{one['seconds']:8.2f}{one['peak']:9.0f}{one['trained']:13,}{one['saved']:10.2f}"
        lines.append(line)
    return "\n".join(lines)


def draw(made: dict[str, dict[str, Any]], path: str) -> None:
    """Quality against memory: a point a method, larger the more has to be kept; one off the scale at its edge."""
    figure, axes = new_figure(8, 5)
    points = {name: one for name, one in made.items() if "peak" in one}
    untuned = made["untuned"]["loss"] if "untuned" in made else max((one["loss"] for one in points.values()), default=1)
    for k, (name, one) in enumerate(sorted(points.items(), key=lambda item: item[1]["peak"])):
        height = min(one["loss"], untuned)
        axes.scatter(one["peak"], height, s=20 + 8 * one["saved"] ** 0.5, alpha=0.6)
        label = name if one["loss"] <= untuned else f"{name}: {one['loss']:.1f}"
        above = 6 if k % 2 else -12  # neighbours do not write over each other
        axes.annotate(label, (one["peak"], height), xytext=(4, above), textcoords="offset points", fontsize=8)
    axes.axhline(untuned, color="grey", linestyle=":", label="untuned, and what is worse")
    axes.legend()
    axes.set(xlabel="peak memory of training (MB)", ylabel="held-out loss (nats a token)")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
