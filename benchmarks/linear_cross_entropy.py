"""Time and memory of one forward and backward of the output head's loss, against peers in the same run.

    python benchmarks/linear_cross_entropy.py [--rows 2048 --width 576 --vocabulary 49152 --repetitions 5]

Paths take turns in every repetition, so that a busy machine hits all of them; a ratio is the median of the repetitions'
own ratios to materialised logits. Memory is the peak of what torch's allocator gave out during one more run, inputs not
counted: on CUDA its own peak counter, on a CPU the profiler's record of every allocation. Peers that cannot weight
tokens take the plain sum; the work is the same. Before anything is timed, ours must agree with the materialised logits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lightning_peft.kernels import linear_cross_entropy, weighted_linear_cross_entropy

#: Case -> most of materialised logits' time and memory that ours may take.
TARGETS = {
    "frozen head": (0.85, 1 / 20),
    "trainable head, weights by a rule": (1.0, 1 / 4),
    "trainable head, any upstream": (1.2, 1 / 4),
}
PLAIN = "materialised logits"
OURS = "lightning_peft"


@dataclass
class Head:
    """Rows, the head's weight, labels, and what the rows' losses are multiplied by."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor


def by_rule(nll: Tensor) -> Tensor:
    """Dynamic fine-tuning's weight, the token's probability."""
    return (-nll.detach()).exp()


def materialised(head: Head, case: str) -> Tensor:
    nll = F.cross_entropy(head.hidden @ head.weight.T, head.labels, reduction="none").float()
    return ((by_rule(nll) if "rule" in case else head.upstream) * nll).sum()


def transformers_loss(head: Head, case: str) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = (head.hidden @ head.weight.T)[None]
    return ForCausalLMLoss(logits, None, len(head.weight), num_items_in_batch=1, shift_labels=head.labels[None])


def ours(head: Head, case: str) -> Tensor:
    if "rule" in case:
        rule = lambda rows: by_rule(rows.nll)  # noqa: E731
        return weighted_linear_cross_entropy(head.hidden, head.weight, head.labels, rule)[0]
    nll = linear_cross_entropy(head.hidden, head.weight, head.labels)
    assert isinstance(nll, Tensor)
    return (head.upstream * nll).sum()


def liger(head: Head, case: str) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(head.weight, head.hidden, head.labels)


def cut_cross_entropy(head: Head, case: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cce

    nll = cce(head.hidden, head.weight, head.labels, reduction="none").float()
    return ((by_rule(nll) if "rule" in case else head.upstream) * nll).sum()


def paths(device: str) -> dict[str, Callable[[Head, str], Tensor]]:
    found = {PLAIN: materialised, "transformers' ForCausalLMLoss": transformers_loss, OURS: ours}
    if device == "cuda" and find_spec("liger_kernel"):
        found["Liger"] = liger
    if device == "cuda" and find_spec("cut_cross_entropy"):
        found["cut-cross-entropy"] = cut_cross_entropy
    return found


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Most bytes that `run` held beyond what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_head(args: argparse.Namespace, trained: bool) -> Head:
    torch.manual_seed(0)
    like = {"dtype": getattr(torch, args.dtype), "device": args.device}
    return Head(
        torch.randn(args.rows, args.width, **like).requires_grad_(),
        torch.randn(args.vocabulary, args.width, **like).mul_(0.04).requires_grad_(trained),
        torch.randint(args.vocabulary, (args.rows,), device=args.device),
        torch.randn(args.rows, device=args.device),
    )


def gradients(path: Callable[[Head, str], Tensor], head: Head, case: str) -> list[Tensor]:
    wanted = [x for x in (head.hidden, head.weight) if x.requires_grad]
    return list(torch.autograd.grad(path(head, case), wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="float32, bfloat16 or float16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"N {args.rows}, H {args.width}, V {args.vocabulary}, {args.dtype}; {where}; torch {torch.__version__}")
    print(f"load average {os.getloadavg()[0]:.1f}, median of {args.repetitions} interleaved repetitions\n")
    line = "{:<34} {:<30} {:>9} {:>7} {:>8} {:>9} {:>8} {:>8}"
    print(line.format("case", "path", "seconds", "ratio", "target", "peak MB", "ratio", "target"))
    for case, (time_target, memory_target) in TARGETS.items():
        head = make_head(args, trained=case != "frozen head")
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if args.dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
        for found, expected in zip(gradients(ours, head, case), gradients(materialised, head, case)):
            torch.testing.assert_close(found, expected, **tolerance)
        del found, expected

        runs = {name: lambda path=path: gradients(path, head, case) for name, path in paths(args.device).items()}  # noqa: B023
        memory = {name: peak_memory(run, args.device) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.repetitions):
            for name, run in runs.items():
                times[name].append(seconds(run, args.device))
        for name in runs:
            ratio = statistics.median(a / b for a, b in zip(times[name], times[PLAIN]))
            saved = memory[name] / memory[PLAIN]
            targets = (f"<= {time_target:.2f}", f"<= {memory_target:.3f}") if name == OURS else ("", "")
            numbers = (f"{statistics.median(times[name]):.3f}", f"{ratio:.2f}", targets[0])
            print(
                line.format(case, name, *numbers, f"{memory[name] / 1e6:.0f}", f"{saved:.3f}", targets[1]), flush=True
            )


if __name__ == "__main__":
    main()
