"""Supervised fine-tuning on sets of reasoning traces, each under a tag of its own (SSFT, ICLR 2026, arXiv 2510.05132).

A question x comes with traces r_1 ... r_M; reserved tokens g_1 ... g_N, N >= M, stand before a trace and are to name
ways of reasoning. Which trace belongs to which tag is decided by the network itself, anew at every visit of the
question, by a matching of least cost:

    C[i, j] = mean nll of the first L tokens of r_j given (x, g_i),     no gradient, no dropout
    sigma = argmin over injections j -> i of sum_j C[sigma(j), j]
    loss = SFT loss of r_j given (x, g_sigma(j)), all j

With traces assigned in a fixed or random order the ways of reasoning collapse into one under every tag
(`ssft_matching`).

The paper sums the loss over tokens and traces; here it is the mean over the tokens of the step, as everywhere. The tag
is a condition in the paper's equation and not a target, which is `ssft_loss_on_tag`'s default; what the training code
does is not known (only evaluation is released, which puts `<|im_start|><think1>\\n` behind the generation prompt).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.models.causal_lm import IGNORED, CausalLM
from lightning_peft.network_modes import evaluation_mode
from lightning_peft.objectives.objective import Objective

if TYPE_CHECKING:
    from lightning_peft.models.fine_tuning_module import FineTuningModule
    from lightning_peft.objectives.objective import Batch

MATCHINGS = ("optimal", "fixed", "random")


def tag_names(tags: int | list[str]) -> list[str]:
    """`<think1>` ... `<thinkN>` of a number; a list as it is."""
    return [f"<think{i + 1}>" for i in range(tags)] if isinstance(tags, int) else list(tags)


def match_traces(costs: Tensor) -> Tensor:
    """The tag of each trace [M] in the matching of least cost.

    Args:
        costs: C [N, M] of tag i with trace j, M <= N.
    """
    from scipy.optimize import linear_sum_assignment

    traces, tags = linear_sum_assignment(costs.double().cpu().numpy().T)
    return torch.from_numpy(tags[traces.argsort()])


class SetSupervised(Objective):
    """Traces of a question under the tags that suit them best.

    Batches hold, beside the columns of `CausalLM`, `question_id` [rows]: rows with the same number are traces of one
    question, and all of them are in the batch (`TraceSetData`, `TraceSetCollator`). In each row one of the tags stands
    before the first label; which one does not matter.

    The tags' embeddings have to train. Under LoRA that needs `trainable_token_indices` for them in the PEFT config.

    Args:
        ssft_tags: N, for tags `<think1>` ... `<thinkN>`, or their names.
        ssft_matching: "optimal"; or, to compare with, "fixed" (in the order of the data) or "random".
        ssft_match_tokens: L, tokens of a trace that the cost looks at.
        ssft_loss_on_tag: Learn the tag too, for a network that is to choose it by itself.
        ssft_add_tags: Add tags that the tokenizer lacks to it and to the network.

    Raises:
        ValueError: An argument is out of range, tags are missing, or a batch is no set of traces with tags.
    """

    changes_inputs = True  # the tags

    def __init__(
        self,
        ssft_tags: int | list[str] = 6,
        ssft_matching: str = "optimal",
        ssft_match_tokens: int = 1000,
        ssft_loss_on_tag: bool = False,
        ssft_add_tags: bool = True,
    ) -> None:
        names = tag_names(ssft_tags)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"ssft_tags={ssft_tags!r}: give at least one tag, and none twice.")
        if ssft_matching not in MATCHINGS:
            raise ValueError(f"ssft_matching={ssft_matching!r} is not known: use one of {MATCHINGS}.")
        if ssft_match_tokens < 1:
            raise ValueError(f"ssft_match_tokens={ssft_match_tokens} must be at least 1.")
        self.tags, self.matching, self.match_tokens = names, ssft_matching, ssft_match_tokens
        self.loss_on_tag, self.add_tags = ssft_loss_on_tag, ssft_add_tags
        self.ids = torch.empty(0, dtype=torch.long)
        #: How often each tag was given a trace in training; the paper prompts the most used one for a single answer.
        self.matched = torch.zeros(len(names), dtype=torch.long)

    def attach(self, module: FineTuningModule) -> None:
        if not isinstance(module, CausalLM):
            raise ValueError(f"SetSupervised trains a causal language model, and {type(module).__name__} is none.")
        tokenizer = module.tokenizer
        if tokenizer is None:
            raise ValueError("SetSupervised looks its tags up in the tokenizer: pass CausalLM(tokenizer=...).")
        known = tokenizer.get_vocab()
        missing = [tag for tag in self.tags if tag not in known]
        if missing and not self.add_tags:
            raise ValueError(
                f"the tokenizer has no {missing}: name tags that are in its vocabulary, or set ssft_add_tags=True."
            )
        if missing:
            tokenizer.add_tokens(missing, special_tokens=True)
            network: Any = module.model
            if len(tokenizer) > network.get_input_embeddings().num_embeddings:
                with torch.random.fork_rng(devices=[]):  # the same new rows on every rank
                    torch.manual_seed(0)
                    network.resize_token_embeddings(len(tokenizer))
        self.ids = torch.tensor(tokenizer.convert_tokens_to_ids(self.tags))

    # -- the batch ------------------------------------------------------------------------------------------------

    def transform_batch(self, module: FineTuningModule, batch: Batch) -> Batch:
        if "question_id" not in batch:
            raise ValueError(
                "a batch has no question_id, so nothing says which traces belong together: use TraceSetData, or a "
                "TraceSetCollator in the loader."
            )
        _, traces = batch["question_id"].unique(return_counts=True)
        if int(traces.max()) > len(self.tags):
            raise ValueError(
                f"a question has {int(traces.max())} traces and there are {len(self.tags)} tags: each trace needs one "
                "of its own. Raise ssft_tags, or give fewer traces."
            )
        learnt = batch["labels"] != IGNORED
        before = learnt.cumsum(1) == 0  # a row that counts for nothing has no label: any of its tags will do
        is_tag = torch.isin(batch["input_ids"], self.ids) & before
        if not is_tag.any(1).all():
            row = int((~is_tag.any(1)).nonzero()[0])
            raise ValueError(
                f"row {row} of a batch has none of the tags {self.tags} before its first label: write one before each "
                "trace (TraceSetData does), and tokenise with the module's tokenizer, which knows them as tokens."
            )
        time = torch.arange(is_tag.shape[1])
        batch = {**batch, "tag_position": (is_tag * time).argmax(1)}
        if self.loss_on_tag:
            rows = learnt.any(1).nonzero().squeeze(1)
            places = batch["tag_position"][rows]
            batch["labels"] = batch["labels"].clone()
            batch["labels"][rows, places] = batch["input_ids"][rows, places]  # a count; `before_forward` says which tag
        return batch

    def before_forward(self, module: FineTuningModule, batch: Batch) -> Batch:
        tags = self.assigned(module, batch)
        if module.training:
            self.matched += torch.bincount(tags.cpu(), minlength=len(self.tags))
        rows, places = torch.arange(len(tags), device=tags.device), batch["tag_position"]
        ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
        ids[rows, places] = self.ids.to(ids.device)[tags]
        labels[rows, places] = torch.where(labels[rows, places] == IGNORED, IGNORED, ids[rows, places])
        return {**batch, "input_ids": ids, "labels": labels}

    # -- the matching ---------------------------------------------------------------------------------------------

    def assigned(self, module: Any, batch: Batch) -> Tensor:
        """The tag's number for each row, [rows]."""
        questions = batch["question_id"].cpu()
        costs = self.costs(module, batch).cpu() if self.matching == "optimal" else None
        tags = torch.empty_like(questions)
        for question in questions.unique():
            own = questions == question
            if costs is not None:
                tags[own] = match_traces(costs[:, own])
            else:
                every = torch.arange(len(self.tags)) if self.matching == "fixed" else torch.randperm(len(self.tags))
                tags[own] = every[: int(own.sum())]
        return tags.to(batch["input_ids"].device)

    @torch.no_grad()
    def costs(self, module: Any, batch: Batch) -> Tensor:
        """C [N, rows]: mean nll of each row's first L labels under each tag, one pass of the network for each tag."""
        rows, places = torch.arange(len(batch["input_ids"])), batch["tag_position"]
        labels = batch["labels"].clone()
        labels[rows, places] = IGNORED  # the tag is no part of the trace
        labels[(labels != IGNORED).cumsum(1) > self.match_tokens] = IGNORED
        looked_at = torch.cat([places, (labels != IGNORED).any(0).nonzero().flatten()])
        time = int(looked_at.max()) + 1
        # Right of the last label that counts nothing is read; a packed batch has no rows of its own to cut.
        part = {key: batch[key][:, :time] for key in ("input_ids", "attention_mask") if key in batch}
        part["labels"] = labels[:, :time]
        costs = []
        with _without_dropout(module.model):
            for tag in self.ids.to(part["input_ids"].device):
                part["input_ids"] = part["input_ids"].clone()
                part["input_ids"][rows, places] = tag
                index, nll = module.row_losses(part)
                row = index // time
                total = torch.zeros(len(rows), device=nll.device, dtype=nll.dtype).index_add_(0, row, nll)
                costs.append(total / torch.bincount(row, minlength=len(rows)).clamp(min=1))
        return torch.stack(costs)

    def state_dict(self) -> dict[str, Any]:
        return {"matched": self.matched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.matched = state["matched"]


@contextmanager
def _without_dropout(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; random numbers go on as if nothing had been."""
    device = next(network.parameters()).device
    with evaluation_mode(network), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class SetSupervisedMixin:
    """Adds `SetSupervised` to a `CausalLM`.

    Args:
        ssft_tags: N, for tags `<think1>` ... `<thinkN>`, or their names.
        ssft_matching: "optimal"; or, to compare with, "fixed" (in the order of the data) or "random".
        ssft_match_tokens: L, tokens of a trace that the cost looks at.
        ssft_loss_on_tag: Learn the tag too, for a network that is to choose it by itself.
        ssft_add_tags: Add tags that the tokenizer lacks to it and to the network.
    """

    def __init__(
        self,
        *args: Any,
        ssft_tags: int | list[str] = 6,
        ssft_matching: str = "optimal",
        ssft_match_tokens: int = 1000,
        ssft_loss_on_tag: bool = False,
        ssft_add_tags: bool = True,
        **kwargs: Any,
    ) -> None:
        objective = SetSupervised(ssft_tags, ssft_matching, ssft_match_tokens, ssft_loss_on_tag, ssft_add_tags)
        super().__init__(*args, **kwargs)
        self.add_objective(objective)  # type: ignore[attr-defined]


class SetSupervisedCausalLM(SetSupervisedMixin, CausalLM):
    """`CausalLM` that learns sets of reasoning traces, ready for YAML.

    Args:
        *args: The arguments of `CausalLM`.
        **kwargs: Those of `SetSupervisedMixin` and `CausalLM`.
    """
