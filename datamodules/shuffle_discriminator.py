"""Shuffle-aware discrimination: which tokens are reasoning and which boilerplate (SHAD, arXiv 2412.14780).

A copy of the network is tuned on a few rows whose outputs are dealt to other rows' inputs. What it then finds easier
than the network did is boilerplate, for it goes with any input; what it finds harder is reasoning:

    LD(y_k) = l_shuffled(y_k) - l_original(y_k) on the correctly paired rows,   reasoning where LD > 0.

A limit that follows: what the network cannot tell from the input to begin with does not get harder, so it counts as
boilerplate, whatever it is. SHAD needs a network that follows most of the answers already.

No code is published: how the copy is tuned (LoRA, learning rate, epochs) is ours, and so is a permutation without a
fixed point.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from lightning_peft.datamodules.collate import collate
from lightning_peft.datamodules.sources import Source
from lightning_peft.datamodules.token_pass import TokenPassData, TokenRow
from lightning_peft.models.causal_lm import IGNORED, CausalLM


def derangement(n: int, seed: int) -> np.ndarray:
    """A random permutation [n] without a fixed point: one cycle through all.

    Raises:
        ValueError: n is below 2.
    """
    if n < 2:
        raise ValueError(f"{n} row cannot be shuffled: give at least 2.")
    cycle = np.random.default_rng(seed).permutation(n)
    out = np.empty(n, dtype=np.int64)
    out[cycle] = np.roll(cycle, 1)
    return out


def shuffled(rows: list[TokenRow], seed: int, max_length: int | None = None) -> list[TokenRow]:
    """Rows with outputs (everything from the first learnt token on) dealt to other rows' inputs.

    Args:
        rows: Token ids and labels of each row.
        seed: Seed of the permutation.
        max_length: Tokens kept of a row.

    Returns:
        As many rows: input i with output `derangement(n, seed)[i]`.
    """
    first = [next((t for t, label in enumerate(labels) if label != IGNORED), len(labels)) for _, labels in rows]
    made = []
    for i, other in enumerate(derangement(len(rows), seed)):
        before, behind = first[i], first[other]
        ids = rows[i][0][:before] + rows[other][0][behind:]
        labels = [IGNORED] * before + rows[other][1][behind:]
        made.append((ids[:max_length], labels[:max_length]))
    return made


def tuned_copy(
    network: Any, rows: list[TokenRow], epochs: int, learning_rate: float, batch_size: int, lora_rank: int, seed: int
) -> Any:
    """A copy of the network fine-tuned on the rows by AdamW; the network and the global generator stay as they are.

    Args:
        network: A causal language model.
        rows: Token ids and labels of each row.
        epochs: Passes over the rows.
        learning_rate: Constant.
        batch_size: Rows of a step.
        lora_rank: Rank of LoRA on every linear layer; 0 trains all weights.
        seed: Seed of the order, of LoRA and of dropout.
    """
    device = next(network.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        tuned = copy.deepcopy(network)
        if lora_rank:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
            tuned = get_peft_model(tuned, config)
        else:
            tuned.requires_grad_(True)
        module = CausalLM(tuned.train())
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], learning_rate)
        for _ in range(epochs):
            for part in torch.randperm(len(rows)).split(batch_size):
                examples = [{"input_ids": rows[i][0], "labels": rows[i][1]} for i in part.tolist()]
                batch = {name: value.to(device) for name, value in collate(examples, pad_token_id=0).items()}
                _, nll = module.row_losses(batch)
                optimizer.zero_grad()
                (nll.sum() / max(len(nll), 1)).backward()
                torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
                optimizer.step()
    return tuned.requires_grad_(False).eval()


class ShuffleDiscriminatedData(TokenPassData):
    """Instruction data whose training rows say which tokens are reasoning, for `ReasoningHighlightedMixin`.

    Adds `reasoning_mask` [batch, time], 1 on reasoning tokens. Before training a copy of the network is tuned on a few
    shuffled rows and both are run over all training rows; the copy is then dropped. Meanwhile the network stands in
    memory twice.

    Args:
        data: As for `InstructionData`.
        shuffled_fraction: Fraction of the training rows that the copy is tuned on; 0.01 is the paper's.
        shuffled_rows: These many at least (or all there are).
        shuffled_epochs: Passes over them.
        shuffled_learning_rate: The copy's learning rate.
        shuffled_batch_size: Rows of its optimizer step.
        shuffled_lora_rank: Rank of its LoRA; 0 trains all weights.
        threshold: A token is reasoning where its loss rises by more than this, in nats.
        **kwargs: Further arguments of `TokenPassData` and `InstructionData`.

    Raises:
        ValueError: An argument is out of range, or fewer than two rows are there.
    """

    cache_name = "shuffle_discriminator"
    passed_splits = ("train",)

    def __init__(
        self,
        data: Source,
        shuffled_fraction: float = 0.01,
        shuffled_rows: int = 64,
        shuffled_epochs: int = 3,
        shuffled_learning_rate: float = 1e-4,
        shuffled_batch_size: int = 8,
        shuffled_lora_rank: int = 8,
        threshold: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(data=data, **kwargs)
        if not 0 < shuffled_fraction <= 1:
            raise ValueError(f"shuffled_fraction={shuffled_fraction} must be in (0, 1].")
        least = {"shuffled_rows": 2, "shuffled_epochs": 1, "shuffled_batch_size": 1, "shuffled_lora_rank": 0}
        for what, minimum in least.items():
            if locals()[what] < minimum:
                raise ValueError(f"{what}={locals()[what]} must be at least {minimum}.")
        if not shuffled_learning_rate > 0:
            raise ValueError(f"shuffled_learning_rate={shuffled_learning_rate} must be above 0.")
        self.shuffled_fraction, self.shuffled_rows, self.threshold = shuffled_fraction, shuffled_rows, threshold
        self.tuning = {
            "epochs": shuffled_epochs,
            "learning_rate": shuffled_learning_rate,
            "batch_size": shuffled_batch_size,
            "lora_rank": shuffled_lora_rank,
            "seed": self.seed,
        }
        self.token_columns += ("reasoning_mask",)
        self._tuned: Any = None

    def settings(self) -> dict[str, Any]:
        chosen = {"fraction": self.shuffled_fraction, "rows": self.shuffled_rows, "threshold": self.threshold}
        return {**self.tuning, **chosen, "max_length": self.max_length}

    def documents(self, split: str) -> Any:
        made = super().documents(split)
        self._tuned = None  # its weights serve nothing else
        return made

    def columns(self, network: Any, rows: list[TokenRow], every_row: list[TokenRow]) -> list[dict[str, Any]]:
        if self._tuned is None:
            n = max(round(self.shuffled_fraction * len(every_row)), min(self.shuffled_rows, len(every_row)))
            chosen = np.random.default_rng(self.seed).choice(len(every_row), n, replace=False)
            subset = shuffled([every_row[i] for i in chosen], self.seed, self.max_length)
            self._tuned = tuned_copy(network, subset, **self.tuning)  # type: ignore[arg-type]
        return [{"reasoning_mask": mask} for mask in self._masks(network, self._tuned, rows)]

    def _masks(self, network: Any, tuned: Any, rows: list[TokenRow]) -> list[list[int]]:
        made: list[list[int]] = []
        for batch, part in self.batches(rows, next(network.parameters()).device):
            index, original = CausalLM(network).row_losses(batch)
            _, behind_shuffle = CausalLM(tuned).row_losses(batch)
            mask = torch.zeros_like(batch["labels"]).flatten()
            mask[index] = (behind_shuffle - original > self.threshold).long()  # LD > 0
            mask = mask.view_as(batch["labels"]).cpu()
            made += [own[: len(ids)].tolist() for own, (ids, _) in zip(mask, part)]
        return made
