"""What a network holds for likely before it is trained, at every position: a cached reference for paper 52's KL."""

from __future__ import annotations

from typing import Any

import torch

from lightning_peft.datamodules.sources import Source
from lightning_peft.datamodules.token_pass import TokenPassData, TokenRow
from lightning_peft.models.causal_lm import CausalLM
from lightning_peft.models.output_head import head_of
from lightning_peft.objectives.self_constrained import with_rest


class ReferenceData(TokenPassData):
    """Instruction data with the starting network's most likely tokens, for `SelfConstrainedMixin`'s "cached" reference.

    Adds `reference_ids` [batch, time, k] and `reference_log_probs` [batch, time, k + 1], the last of these being log p
    of all other tokens together; zeros where nothing is learnt. Takes about 8 k bytes a token on disk.

    Args:
        data: As for `InstructionData`.
        reference_top_k: k. The term against the rest as one token is a lower bound of the whole KL.
        **kwargs: Further arguments of `TokenPassData` and `InstructionData`.

    Raises:
        ValueError: k is below 1 or not below the vocabulary's size.
    """

    cache_name = "reference"

    def __init__(self, data: Source, reference_top_k: int = 64, **kwargs: Any) -> None:
        super().__init__(data=data, **kwargs)
        if reference_top_k < 1:
            raise ValueError(f"reference_top_k={reference_top_k} must be at least 1.")
        self.reference_top_k = reference_top_k
        self.token_columns += ("reference_ids", "reference_log_probs")

    def settings(self) -> dict[str, Any]:
        return {"top_k": self.reference_top_k}

    def columns(self, network: Any, rows: list[TokenRow], every_row: list[TokenRow]) -> list[dict[str, Any]]:
        module, head = CausalLM(network), head_of(network)
        vocabulary, k = network.config.get_text_config().vocab_size, self.reference_top_k
        if k >= vocabulary:
            raise ValueError(f"reference_top_k={k} must be below the vocabulary's {vocabulary} tokens.")
        made = []
        for batch, part in self.batches(rows, next(network.parameters()).device):
            hidden = module.hidden_states(batch)
            for own, (ids, labels) in zip(hidden, part):
                learnt = torch.tensor(labels[1:], device=own.device).ne(-100).nonzero().squeeze(1)
                top = torch.zeros(len(ids), k, dtype=torch.int32)
                log_q = torch.zeros(len(ids), k + 1)
                for places in learnt.split(1024):
                    log_p = module.logit_transform(head(own[places])).float().log_softmax(-1)
                    most = log_p.topk(k, dim=-1).indices
                    # Beside the token itself, as labels stand: position t - 1 predicts it.
                    top[places.cpu() + 1], log_q[places.cpu() + 1] = most.int().cpu(), with_rest(log_p, most).cpu()
                made.append({"reference_ids": top.numpy(), "reference_log_probs": log_q.numpy()})
        return [{name: value.tolist() for name, value in row.items()} for row in made]
