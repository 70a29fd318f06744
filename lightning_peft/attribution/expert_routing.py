"""Which experts a task's tokens are sent to: the statistics that ESFT chooses experts by (paper 116, arXiv 2407.01906).

Over a sample of the task's tokens, for expert i of a layer whose router picks K experts for each token (eqs. 5 and 6):

    token selection ratio   r_i = mean over tokens of 1[i is picked] / K
    average gate score      g_i = mean over tokens of the gate value of i where it is picked, 0 elsewhere

r sums to 1 over a layer's experts. g sums to what the picked gates sum to and is not renormalised: below 1 for a plain
softmax, 1 where the network normalises its picks (Mixtral, `norm_topk_prob`), and what a routed scaling factor makes of
it. Gate values are those that the network multiplies the experts' outputs by.

The paper takes the mean within a sequence first; the authors' code, and this one, over all tokens. Their
`generate_expert_config.py` divides by sums over layers (deepseek-ai/ESFT, issue 17), but their published scores are
those of each layer, as in the paper and here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network_modes import evaluation_mode
from lightning_peft.roles import Weight, inner_model, weights_by_role

METHOD = "expert-routing"
#: The rows of a layer's statistics.
SCORES = ("token", "gate")
#: The sample's size in the paper: 32 sequences of 4,096.
TOKENS = 131_072


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one layer that a router chooses from.

    Args:
        number: How many there are.
        fused: Tensors of all experts, one block of the first dimension each.
        single: Weights of one expert each, and its number.
    """

    number: int
    fused: list[str] = field(default_factory=list)
    single: dict[str, int] = field(default_factory=dict)


def expert_layers(weights: Sequence[Weight]) -> dict[str, ExpertLayer]:
    """A network's layers of routed experts by the name of the module that holds the experts, in the network's order.

    Raises:
        ValueError: There are none, or they are stored in a form that is not known.
    """
    fused: dict[str, list[Weight]] = {}
    single: dict[str, dict[str, int]] = {}
    for weight in weights:
        if not weight.role.startswith("expert."):
            continue
        found = re.match(r"((?:.+?\.)?experts?)\.(?:(\d+)\.)?", weight.name)
        assert found is not None  # the role says that a part of the path is "experts"
        if found[2] is not None:
            single.setdefault(found[1], {})[weight.name] = int(found[2])
            continue
        if len(weight.shape) != (2 if weight.is_bias else 3):
            raise ValueError(
                f"{weight.name} of shape {weight.shape} holds experts in a form that is not known: a list of modules, "
                "or tensors with a block of the first dimension for each expert, can train in part."
            )
        fused.setdefault(found[1], []).append(weight)
    names = dict.fromkeys(re.match(r"((?:.+?\.)?experts?)\.", w.name)[1] for w in weights if w.role[:7] == "expert.")  # type: ignore[index]
    layers = {}
    for name in names:
        of_all, of_one = fused.get(name, []), single.get(name, {})
        number = of_all[0].shape[0] if of_all else max(of_one.values()) + 1
        layers[name] = ExpertLayer(number, [w.name for w in of_all], of_one)
    if not layers:
        raise ValueError(
            "this network is dense, no router chooses between experts in it: ExpertSpecialized needs a mixture of "
            "experts such as Mixtral, OLMoE, Qwen-MoE or DeepSeek. For dense ones there are LoKI, SliceFine, "
            "HalfFineTuning and PEFT."
        )
    return layers


def routing_sums(index: Tensor, gates: Tensor, experts: int) -> Tensor:
    """What some tokens add to the statistics: sums of 1[picked] / K and of gate values, [2, experts], float64, on CPU.

    Args:
        index: The experts picked for each token, [tokens, K].
        gates: Their gate values, [tokens, K].
        experts: How many there are to pick from.
    """
    picked = index.detach().flatten().cpu()  # on CPU: there the sum's order is always the same
    count = torch.bincount(picked, minlength=experts).double() / index.shape[-1]
    gate = torch.zeros(experts, dtype=torch.float64).index_add_(0, picked, gates.detach().flatten().cpu().double())
    return torch.stack([count, gate])


def relevant_experts(scores: Tensor, top_p: float) -> Tensor:
    """The smallest set of experts, from the highest score down, whose scores sum to `top_p` or more (eq. 7).

    An expert without a score is never in it: where the sum stays below `top_p`, all others are.

    Args:
        scores: Of one layer, [experts].
        top_p: The sum to reach.

    Returns:
        Their numbers, in descending order of score; of equal ones the first comes first.

    Raises:
        ValueError: `top_p` lies outside of (0, 1].
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]: it is the sum of scores that the chosen experts reach.")
    values, order = scores.double().sort(descending=True, stable=True)
    before = values.cumsum(0).roll(1)  # the sum that was reached without this expert
    before[0] = 0
    return order[(before < top_p) & (values > 0)]


def drawn(sequences: Sequence[Sequence[int]], tokens: int = TOKENS, seed: int = 0) -> list[list[int]]:
    """Whole sequences in random order until they hold `tokens` tokens, or there are no more."""
    taken, held = [], 0
    for i in random.Random(seed).sample(range(len(sequences)), len(sequences)):
        if held >= tokens:
            break
        taken.append(list(sequences[i]))
        held += len(taken[-1])
    return taken


def routing_scores(
    network: nn.Module,
    sequences: Sequence[Sequence[int]],
    rank: int = 0,
    world_size: int = 1,
    add: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Tensor]:
    """The statistics of every layer of experts, from forwards of one sequence each, without the output head.

    Args:
        network: A network with routed experts, wrapped or not.
        sequences: Token ids of each; all ranks give the same.
        rank: This process reads every `world_size`-th sequence from here on.
        world_size: How many processes share the work.
        add: Sums a tensor over these processes; called once.
        progress: Called with the number of sequences that this process has read.

    Returns:
        By the name of the experts' module in `network`, [2, experts], float64: the rows are `SCORES`.

    Raises:
        ValueError: The network is dense, its weights are not there yet, its routers do not say what they pick, or a
            sequence is empty.
    """
    if not sequences or not all(len(sequence) for sequence in sequences):
        raise ValueError("there is no sequence to route, or one of them has no token.")
    weights = weights_by_role(network)
    layers = expert_layers(weights)
    device = next(network.parameters()).device
    if device.type == "meta":
        raise ValueError(
            "the network's weights are not loaded yet (meta device): make the scores before, by `lightning-peft select "
            f"--method {METHOD}`."
        )
    inner = inner_model(network)
    trunk = getattr(inner, "base_model", inner)
    sums = {name: torch.zeros(2, layer.number, dtype=torch.float64) for name, layer in layers.items()}
    with evaluation_mode(network), torch.no_grad(), _summed(network, weights, layers, sums):
        for done, sequence in enumerate(sequences[rank::world_size], 1):
            trunk(input_ids=torch.tensor([list(sequence)], device=device), use_cache=False)
            if progress is not None:
                progress(done)
    total = torch.cat([value.flatten() for value in sums.values()])
    if add is not None:
        total = add(total)
    tokens = sum(len(sequence) for sequence in sequences)
    parts = total.split([value.numel() for value in sums.values()])
    scores = {name: part.view(2, -1) / tokens for name, part in zip(sums, parts)}
    for name, score in scores.items():  # after the sum: every rank raises, or none
        if abs(float(score[0].sum()) - 1) > 1e-6:
            raise ValueError(
                f"the routing of {name} cannot be read: neither the experts nor the router beside them are handed, or "
                "give, the numbers of the picked experts [tokens, K] with their gate values for every token."
            )
    return scores


def _routing(values: Any) -> tuple[Tensor, Tensor] | None:
    """Picked experts and their gate values [tokens, K], among what a module is handed or gives back."""
    if not isinstance(values, (tuple, list)):
        return None
    tensors = [value for value in values if isinstance(value, Tensor)]
    for index in tensors:
        if index.dtype in (torch.long, torch.int):
            for gates in tensors:
                if gates.is_floating_point() and gates.shape == index.shape:
                    return index, gates
    return None


@contextmanager
def _summed(
    network: nn.Module, weights: Sequence[Weight], layers: dict[str, ExpertLayer], sums: dict[str, Tensor]
) -> Iterator[None]:
    """Adds up what is routed: read where fused experts are handed it, or where a router beside a list gives it."""
    handles = []
    for name, layer in layers.items():

        def note(values: Any, name: str = name, number: int = layer.number) -> None:
            found = _routing(values)
            if found is not None:
                sums[name] += routing_sums(*found, number)

        if layer.fused:

            def handed(_: nn.Module, args: Any, kwargs: Any, note: Any = note) -> None:
                note([*args, *kwargs.values()])

            handles.append(network.get_submodule(name).register_forward_pre_hook(handed, with_kwargs=True))
            continue

        def given(_: nn.Module, __: Any, output: Any, note: Any = note) -> None:
            note(output)

        beside = f"{name.rpartition('.')[0]}."
        routers = {w.name.rpartition(".")[0] for w in weights if w.role == "router" and w.name.startswith(beside)}
        handles += [network.get_submodule(router).register_forward_hook(given) for router in sorted(routers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
