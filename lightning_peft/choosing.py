"""Which method to use: task, number of examples and memory in, a recommendation with its rule and paper out.

The rules are findings of two studies. Paper 76 (arXiv 2304.14999; FLAN-T5-XL on classification and generation with 100,
1,000 and 10,000 examples): with few examples LoRA and BitFit end better than full fine-tuning, which in turn converges
faster; with many, full fine-tuning ends best and converges no faster; (IA)^3 trains least; adapted attention matters
most, and late blocks more than early ones. Paper 62 (arXiv 2308.10462; code generation): LoRA leads (IA)^3, prefix and
prompt tuning, and on a base in 4 bits it is as good in about half the memory. Where memory forbids full fine-tuning,
half fine-tuning (paper 58, arXiv 2404.18466) stands in for it.

Paper 76's own table of choices could not be had: the above is what its abstract and a reader's summary say. Ours are
the bounds between its three sizes (their geometric means) and the memory of a weight, which is plain arithmetic.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from lightning_peft.registry import technique

TASKS = ("classification", "generation", "code")
PRIORITIES = ("quality", "speed", "size")
#: Examples from which on there are a medium and a large number of them: sqrt(100 x 1,000) and sqrt(1,000 x 10,000).
MEDIUM, LARGE = 316, 3162
#: Share of the memory that is left to activations.
ACTIVATIONS = 0.25

_LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}

#: Method -> bytes for each weight of the network, and the callback as a YAML names it.
METHODS: dict[str, tuple[float, dict[str, Any] | None]] = {
    # a weight in fp32, its gradient, AdamW's two moments
    "full fine-tuning": (16, None),
    # gradient and moments of one weight in two
    "half fine-tuning": (
        10,
        {"class_path": "lightning_peft.callbacks.HalfFineTuning", "init_args": {"train_embeddings": False}},
    ),
    # frozen weights in bf16
    "LoRA": (2, {"class_path": "lightning_peft.callbacks.PEFT", "init_args": {"config": _LORA}}),
    "IA3": (2, {"class_path": "lightning_peft.callbacks.PEFT", "init_args": {"config": {"peft_type": "IA3"}}}),
    # 4 bits, and a scale in fp32 for each 64 weights
    "QLoRA": (
        0.5625,
        {
            "class_path": "lightning_peft.callbacks.PEFT",
            "init_args": {"config": _LORA, "quantization_config": _NF4},
        },
    ),
}


@dataclass(frozen=True)
class Recommendation:
    """A method, and why.

    Args:
        method: One of `METHODS`.
        callback: What goes under `trainer.callbacks` in a YAML; `None` where none is needed.
        rule: The rule it follows.
        paper: Number of the paper behind the rule.
        memory: GB for weights, gradients and optimizer state; `None` where the network's size is not known.
        passed_over: Methods that the rules put first and memory forbids, with what they would need.
        hints: What else the papers found for this case.
    """

    method: str
    callback: dict[str, Any] | None
    rule: str
    paper: int
    memory: float | None = None
    passed_over: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.method}", f"  rule: {self.rule}"]
        lines.append(f"  paper {self.paper}: {technique(self.paper).title}")
        if self.memory is not None:
            lines.append(f"  memory: about {self.memory:.1f} GB, activations apart")
        lines += [f"  does not fit: {one}" for one in self.passed_over]
        lines += [f"  also: {one}" for one in self.hints]
        lines.append(f"  trainer.callbacks: {json.dumps([self.callback] if self.callback else [])}")
        return "\n".join(lines)


def choose(
    task: str,
    examples: int,
    memory: float | None = None,
    parameters: float | str | None = None,
    priority: str = "quality",
) -> Recommendation:
    """Recommends a fine-tuning method, with the rule that it follows and the paper behind the rule.

    Args:
        task: "classification", "generation" or "code" (generation of code).
        examples: Training examples.
        memory: GB on a device; by default there is enough. A quarter is left to activations.
        parameters: Weights of the network, such as 135M or 7B; needed where `memory` is given.
        priority: What counts: "quality" in the end, "speed" of convergence, or "size" of what trains and is kept.

    Raises:
        ValueError: An argument is not one of these, or no method fits the memory.
    """
    for name, given, known in (("task", task, TASKS), ("priority", priority, PRIORITIES)):
        if given not in known:
            raise ValueError(f"{name}={given!r} is not known: use one of {', '.join(known)}.")
    if examples < 1:
        raise ValueError(f"examples={examples} must be at least 1: it is the number of training examples.")
    if memory is not None and memory <= 0:
        raise ValueError(f"memory={memory} must be more than 0: it is the GB of a device.")
    if memory is not None and parameters is None:
        raise ValueError("memory is given without parameters: say the network's size too, such as parameters='7B'.")
    weights = None if parameters is None else _number(parameters)
    passed_over: list[str] = []
    for method, rule, paper in _in_order(task, examples, priority):
        each, callback = METHODS[method]
        needed = None if weights is None else each * weights / 1e9
        if memory is None or needed is None or needed <= (1 - ACTIVATIONS) * memory:
            hints = _hints(method, task, examples, priority)
            return Recommendation(method, callback, rule, paper, needed, tuple(passed_over), hints)
        passed_over.append(f"{method}, about {needed:.1f} of {(1 - ACTIVATIONS) * memory:.1f} GB")
    raise ValueError(
        f"no method fits memory={memory} GB with parameters={parameters}: {'; '.join(passed_over)}. Use a smaller "
        "network, or shard it over devices (FSDP2)."
    )


def _in_order(task: str, examples: int, priority: str) -> list[tuple[str, str, int]]:
    """Method, rule and paper, the one to prefer first; each later one needs less memory."""
    few = f"{examples:,} examples are {'few' if examples < MEDIUM else 'a medium number'} (below {LARGE:,})"
    many = f"{examples:,} examples are many (from {LARGE:,} on)"
    quantised = ("QLoRA", "on a base in 4 bits LoRA is as good in about half the memory", 62)
    lora = ("LoRA", f"{few}: LoRA and BitFit end better than full fine-tuning", 76)
    if priority == "size":
        return [("IA3", "of the methods that hold up, (IA)^3 trains and keeps least", 76), quantised]
    if task == "code":
        return [("LoRA", "for code, LoRA leads (IA)^3, prefix and prompt tuning on every network", 62), quantised]
    if examples >= LARGE:
        next_best = ("LoRA", f"{many}, but memory forbids what ends best then: LoRA comes nearest", 76)
        if priority == "speed":
            return [("LoRA", f"{many}: LoRA converges as fast as full fine-tuning, in cheaper steps", 76), quantised]
        return [
            ("full fine-tuning", f"{many}: full fine-tuning ends best", 76),
            ("half fine-tuning", "half of the matrices at a time learn the task as well as all of them", 58),
            next_best,
            quantised,
        ]
    if priority == "speed":
        return [("full fine-tuning", f"{few}: full fine-tuning converges faster than adapters", 76), lora, quantised]
    return [lora, quantised]


def _hints(method: str, task: str, examples: int, priority: str) -> tuple[str, ...]:
    hints = []
    if method in ("LoRA", "QLoRA"):
        hints.append("to train less, adapt attention alone, or late blocks rather than early ones (paper 76)")
    if method == "LoRA" and task != "code" and examples < LARGE and priority == "quality":
        hints.append("BitFit, where the network has biases (BERT, GPT-2; not Llama), is as good and smaller (paper 76)")
    if task == "code":
        hints.append("a large network with LoRA beats a small one that is fully fine-tuned (paper 62)")
    return tuple(hints)


def _number(parameters: float | str) -> float:
    """7e9 of "7B".

    Raises:
        ValueError: It is no positive number.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKmMbB]?)\s*", str(parameters))
    try:
        number = float(found.group(1)) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found.group(2).lower()] if found else 0
    except ValueError:
        number = 0
    if number <= 0:
        raise ValueError(f"parameters={parameters!r} is no number of weights: write 135M, 7B or 7e9.")
    return number
