"""A small network learns how much each token of a document is worth learning (CaMeLS, EMNLP 2023, arXiv 2305.15076).

Importance weights w_t for the tokens of a document are meta-learned so that one step of weighted fine-tuning on it
lowers the loss of questions about it:

    theta_{k+1} = theta_k - a grad_theta (1/n_k) sum_t w_t nll_t(theta_k),    for each document k of the batch, in turn
    L = CE_QA(theta') + c_kl mean KL(p_theta(.|u) || p_theta'(.|u)),          u unrelated text, theta before the batch

and the gradient of L reaches the weights through the steps: they are not detached. Only the weight network trains. The
base never changes: its adapted copy theta' is carried from batch to batch and forgotten every 24 documents.

The meta-gradient is exact and holds the graph of one step at a time. With v_K = grad L(theta_K), backwards over the
steps:

    dL/dw_{k,t} = -(a / n_k) < grad nll_t(theta_k), v_{k+1} >,      v_k = v_{k+1} - a H_k v_{k+1}

H_k the Hessian of step k's weighted loss. Steps after the first take one differentiation of the gradient (nothing but
`linear_cross_entropy(backend="reference")` allows two); the first one, of which no v_0 is wanted, one pass in forward
mode: < grad nll_t, v > of all tokens at once is the directional derivative of nll along v.

Where the published code (nathanhu0/CaMeLS) differs: it divides a step by all positions of a document padded to 1,024
tokens (`meta_divide_by_padding`), here by its own tokens; it takes the steps and p_theta with dropout, so that KL is
above 0 without any step (`meta_dropout` gives dropout to the steps; p_theta never has it); an epoch goes on with the
adapted base of the last, here it begins with the base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_peft.kernels import linear_cross_entropy, linear_kl
from lightning_peft.models.causal_lm import CausalLM
from lightning_peft.models.fine_tuning_module import StepTerms
from lightning_peft.models.output_head import head_of, matrix_of, nll_through_head, replaced_forward
from lightning_peft.models.pretrained import load_pretrained
from lightning_peft.network_modes import evaluation_mode
from lightning_peft.objectives.objective import Objective
from lightning_peft.roles import inner_model
from lightning_peft.when_built import is_sharded

if TYPE_CHECKING:
    from lightning_peft.models.fine_tuning_module import FineTuningModule
    from lightning_peft.objectives.objective import Batch

Parameters = dict[str, Tensor]


class TokenWeightNetwork(nn.Module):
    """softplus_3(Linear(GELU(Linear(h)))) of each token, h a language model's hidden states; ln 2 / 3 to begin with.

    Args:
        body: A transformers model without a head; it trains too.
        width: Width of the layer between.
    """

    def __init__(self, body: Any, width: int = 128) -> None:
        super().__init__()
        self.body = body
        self.inner, self.outer = nn.Linear(body.config.get_text_config().hidden_size, width), nn.Linear(width, 1)
        # Every token starts with the same weight, and the first step says which should have more.
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Weights [batch, time] in fp32, 0 on padding; the one at t is of the *target* token t."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        made = self.outer(F.gelu(self.inner(hidden.to(self.inner.weight.dtype)))).squeeze(-1)
        return F.softplus(made.float(), beta=3) * attention_mask


def weight_network(network: Any, model: str | None) -> TokenWeightNetwork:
    """A `TokenWeightNetwork` on the body of a network by name, or on a copy of the body of the one given.

    Raises:
        ValueError: The two have vocabularies of different sizes.
    """
    own = inner_model(network)
    body = copy.deepcopy(own.base_model) if model is None else load_pretrained("AutoModel", model)
    sizes = [net.config.get_text_config().vocab_size for net in (body, own)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the weight network {model!r} has {sizes[0]} tokens and the network in training {sizes[1]}: weights "
            "belong to tokens, so both need the same tokenizer."
        )
    return TokenWeightNetwork(body.requires_grad_(True).train())


class _Running(nn.Module):
    """Runs a function of a network whose parameters `functional_call` has put in place."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def with_parameters(network: nn.Module, parameters: Parameters, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` while `network` has these values for its parameters; tied ones follow."""
    named = {f"network.{name}": value for name, value in parameters.items()}
    return functional_call(_Running(network, function), named, args)


def predicted_places(attention_mask: Tensor) -> Tensor:
    """Flat places [n] in [batch, time] of the tokens that have one before them: of each document all but the first."""
    mask = attention_mask.bool()
    places = (mask[:, 1:] & mask[:, :-1]).flatten().nonzero().squeeze(1)
    return places + places // max(mask.shape[1] - 1, 1) + 1


def token_losses(module: Any, inputs: Batch) -> Tensor:
    """nll [n] of the tokens at `predicted_places`; differentiable twice, and in forward mode."""
    ids, places = inputs["input_ids"], predicted_places(inputs["attention_mask"])
    head = head_of(module.model)
    made: list[Tensor] = []

    def read(hidden: Tensor) -> Tensor:
        rows = hidden[:, -ids.shape[1] :].flatten(0, 1)[places - 1]
        targets, matrix, transform = ids.flatten()[places], matrix_of(head), module.logit_transform
        if matrix is None:
            made.append(nll_through_head(original, rows, targets, transform).nll)
        else:
            options: Any = {"softcap": transform.softcap, "logit_scale": transform.scale, "backend": "reference"}
            nll: Any = linear_cross_entropy(rows, matrix[0], targets, matrix[1], **options)
            made.append(nll)
        return hidden.new_ones((*hidden.shape[:-1], 1))

    # Fused attention kernels have no second derivative and none in forward mode.
    with replaced_forward(head, read) as original, sdpa_kernel(SDPBackend.MATH):
        module.model(**module.model_inputs({"input_ids": ids, "attention_mask": inputs["attention_mask"]}))
    return made[0]


@dataclass
class InnerStep:
    """One step on documents, and what its derivative needs.

    Args:
        loss: nll [n] at given parameters.
        parameters: theta_k, before the step.
        places: Flat places [n] of the tokens among all documents' weights.
        divisor: n_k.
    """

    loss: Callable[[Parameters], Tensor]
    parameters: Parameters
    places: Tensor
    divisor: float

    def after(self, weights: Tensor, rate: float) -> Parameters:
        """theta_{k+1} = theta_k - a grad (1/n) sum_t w_t nll_t; weights [n], everything without a graph."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        total = (weights * self.loss(leaves)).sum() / self.divisor
        gradient = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {
            name: value.detach() if g is None else value.detach() - rate * g.to(value.dtype)
            for (name, value), g in zip(leaves.items(), gradient)
        }

    def gradient_of_weights(self, v: Parameters, rate: float) -> Tensor:
        """dL/dw_t = -(a / n) < grad nll_t, v > of every token, by one pass in forward mode."""
        tangent: Any = torch.func.jvp(self.loss, (self.parameters,), (v,))[1]
        return -rate / self.divisor * tangent

    def backward(self, weights: Tensor, v: Parameters, rate: float) -> tuple[Tensor, Parameters]:
        """dL/dw_t, and v_k = v_{k+1} - a H_k v_{k+1}, by differentiating the step's gradient."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        weights = weights.detach().requires_grad_()
        total = (weights * self.loss(leaves)).sum() / self.divisor
        gradient = torch.autograd.grad(total, list(leaves.values()), create_graph=True, allow_unused=True)
        used = [(g * direction).sum() for g, direction in zip(gradient, v.values()) if g is not None]
        inputs = [weights, *leaves.values()]
        along, *second = torch.autograd.grad(torch.stack(used).sum(), inputs, allow_unused=True)
        earlier = [d if h is None else d - rate * h for d, h in zip(v.values(), second)]
        return -rate * along, dict(zip(v, earlier))


def weight_gradients(steps: list[InnerStep], weights: list[Tensor], v: Parameters, rate: float) -> list[Tensor]:
    """dL/dw of each step's tokens, from v = grad L at the parameters after the last step.

    Args:
        steps: The steps, in order.
        weights: Each step's weights [n], detached.
        v: Gradient of the loss, by parameter.
        rate: a.
    """
    gradients: list[Tensor] = []
    for step, own in zip(steps[:0:-1], weights[:0:-1]):
        gradient, v = step.backward(own, v, rate)
        gradients.append(gradient)
    gradients.append(steps[0].gradient_of_weights(v, rate))
    return gradients[::-1]


@dataclass
class Stream:
    """Where the base stands among the documents: what it has become, and since how many; None is the base itself.

    Args:
        adapted: The parameters.
        documents: How many documents ago they were the base's.
        epoch: The epoch that it belongs to.
    """

    adapted: Parameters | None = None
    documents: int = 0
    epoch: int = 0


class MetaTokenWeighting(Objective):
    """What `MetaTokenWeightingMixin` holds: the locality term, the stream's state, and the checks.

    Args:
        meta_weight_model: Name of the network whose body makes the weights; by default a copy of the network's own
            body.
        meta_rate: a, the rate of the inner steps.
        meta_locality: c_kl, in front of the KL on unrelated text; 0 leaves it out.
        meta_sequential: A step for each document in turn; else one on all of the batch.
        meta_documents: Documents in a batch.
        meta_reset_every: Documents after which the base is as it was at first.
        meta_dropout: Dropout in the inner steps.
        meta_divide_by_padding: Divide a step by all positions of the padded documents.

    Raises:
        ValueError: An argument is out of range, the network's attention or dtype does not allow second derivatives, or
            a batch has no documents.
    """

    def __init__(
        self,
        meta_weight_model: str | None = None,
        meta_rate: float = 5e-4,
        meta_locality: float = 0.1,
        meta_sequential: bool = True,
        meta_documents: int = 6,
        meta_reset_every: int = 24,
        meta_dropout: bool = False,
        meta_divide_by_padding: bool = False,
    ) -> None:
        if not meta_rate > 0 or not meta_locality >= 0:
            raise ValueError(f"meta_rate={meta_rate} must be above 0 and meta_locality={meta_locality} at least 0.")
        if meta_documents < 1 or meta_reset_every < 1 or meta_reset_every % meta_documents:
            raise ValueError(
                f"meta_reset_every={meta_reset_every} must be a multiple of meta_documents={meta_documents}, the "
                "documents of a batch: the base is reset between batches."
            )
        self.weight_model, self.rate, self.locality = meta_weight_model, meta_rate, meta_locality
        self.sequential, self.batch_documents, self.reset_every = meta_sequential, meta_documents, meta_reset_every
        self.dropout, self.divide_by_padding = meta_dropout, meta_divide_by_padding
        self.streams = {"train": Stream(), "evaluation": Stream()}
        self.names: set[str] = set()
        self._reference: tuple[Tensor, Tensor, Tensor | None] | None = None

    def attach(self, module: FineTuningModule) -> None:
        if not isinstance(module, MetaTokenWeightingMixin):
            raise ValueError(
                f"MetaTokenWeighting changes the step itself: use MetaTokenWeightingCausalLM, or derive from "
                f"MetaTokenWeightingMixin and CausalLM, rather than {type(module).__name__}."
            )
        network: Any = module.model
        dtypes = {p.dtype for p in network.parameters()}
        if torch.float16 in dtypes:
            raise ValueError(
                "the network is stored in float16, in which second derivatives overflow: load it with dtype='float32'."
            )
        attention = getattr(network.config, "_attn_implementation", None)
        if attention not in (None, "eager", "sdpa"):
            raise ValueError(
                f"attn_implementation={attention!r} has no second derivative: use 'sdpa' (its plain kernel is taken) "
                "or 'eager'."
            )
        # Plain SGD on what would train; it trains in the inner steps alone.
        self.names = {name for name, p in network.named_parameters() if p.requires_grad}
        module.token_weights = weight_network(network, self.weight_model)
        network.requires_grad_(False)
        if attention == "sdpa":
            rank_zero_info("meta-learned token weights: attention takes the math kernel, which differentiates twice.")

    def on_fit_start(self, module: FineTuningModule) -> None:
        if is_sharded(module):
            raise ValueError(
                "MetaTokenWeighting steps on whole parameters, and FSDP2 or tensor parallelism has sharded them: use "
                "DDP."
            )
        if module.trainer.world_size > 1 and self.reset_every > self.batch_documents:
            raise ValueError(
                f"meta_reset_every={self.reset_every} carries an adapted base from batch to batch, and under "
                f"{module.trainer.world_size} processes each would have its own, of which a checkpoint holds one: set "
                f"meta_reset_every={self.batch_documents} (the documents of a batch)."
            )

    # -- the outer loss -------------------------------------------------------------------------------------------

    def counts(self, module: FineTuningModule, batch: Batch) -> dict[str, int]:
        if not self.locality or "unrelated" not in batch:
            return {}
        return {"locality": int(batch["unrelated"]["attention_mask"].sum())}

    def auxiliary_losses(self, module: FineTuningModule, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        if self._reference is None:
            return {}
        hidden, weight, bias = self._reference
        rows, own_weight, own_bias = _predictions(module, batch["unrelated"])
        transform: Any = module.logit_transform
        kl = linear_kl(
            rows,
            own_weight,
            hidden,
            weight,
            own_bias,
            bias,
            softcap=transform.softcap,
            logit_scale=transform.scale,
        )
        return {"locality": self.locality * kl.sum()}

    # -- the step -------------------------------------------------------------------------------------------------

    def terms(self, module: Any, batch: Batch, counts: dict[str, Tensor], outer: Callable[..., StepTerms]) -> StepTerms:
        """The outer terms after the inner steps; in training their loss carries the gradient of the weights."""
        if "documents" not in batch:
            raise ValueError("a batch has no documents to adapt to: use DocumentQuestionData.")
        count = len(batch["documents"]["input_ids"])
        if count > self.batch_documents:
            raise ValueError(
                f"a batch has {count} documents and meta_documents={self.batch_documents}: make the data's batch_size "
                "equal to it."
            )
        name, epoch = ("train", module.current_epoch) if module.training else ("evaluation", 0)
        if self.streams[name].epoch != epoch:  # the hook of an epoch's start is not called in a run resumed at one
            self.streams[name] = Stream(epoch=epoch)
        stream = self.streams[name]
        base = {name: p.detach() for name, p in module.model.named_parameters() if name in self.names}
        theta = base if stream.adapted is None else {n: v.to(base[n].device) for n, v in stream.adapted.items()}
        # With gradients to be had even in a validation loop.
        with evaluation_mode(module.model), torch.inference_mode(False), torch.enable_grad():
            # A validation loop's tensors are inference tensors, of which nothing can be differentiated.
            documents = {key: value.clone() for key, value in batch["documents"].items()}
            with torch.set_grad_enabled(module.training):
                weights = module.token_weights(**documents)
            flat = weights.detach().flatten()
            steps = self._adapt(module, theta, documents, flat)
            adapted = steps[-1].after(flat[steps[-1].places], self.rate)
            self._reference = None
            if self.locality and "unrelated" in batch:
                with torch.no_grad():
                    self._reference = with_parameters(module.model, theta, _predictions, module, batch["unrelated"])
            terms, v = self._outer(module, adapted, batch, counts, outer)
            if v is not None:
                own = [flat[step.places] for step in steps]
                gradients = weight_gradients(steps, own, v, self.rate)
                gradient = torch.zeros_like(flat)
                for step, part in zip(steps, gradients):
                    gradient.index_add_(0, step.places, part.to(gradient))
                # Its value is the outer loss, its gradient dL/dw.
                terms.loss = terms.loss.detach() + (gradient * (weights.flatten() - flat)).sum()
            else:
                with torch.no_grad():
                    before = with_parameters(module.model, theta, outer, batch, counts)
                terms.sums["unadapted"], terms.counts["unadapted"] = before.sums["loss"], before.counts["loss"]
        self._reference = None
        self._advance(stream, adapted, count)
        return terms

    def _adapt(self, module: Any, theta: Parameters, documents: Batch, weights: Tensor) -> list[InnerStep]:
        """The inner steps; all but the last are taken."""
        count, time = documents["input_ids"].shape
        groups = [slice(i, i + 1) for i in range(count)] if self.sequential else [slice(0, count)]
        steps: list[InnerStep] = []
        for group in groups:
            part = {key: value[group] for key, value in documents.items()}
            seed = int(torch.randint(2**62, ())) if self.dropout else 0
            if steps:
                theta = steps[-1].after(weights[steps[-1].places], self.rate)
            places = predicted_places(part["attention_mask"])
            divisor = max(len(part["input_ids"]) * (time - 1) if self.divide_by_padding else len(places), 1)

            def loss(parameters: Parameters, part: Batch = part, seed: int = seed) -> Tensor:
                with self._dropout_of(module, seed):
                    return with_parameters(module.model, parameters, token_losses, module, part)

            steps.append(InnerStep(loss, theta, places + group.start * time, float(divisor)))
        return steps

    @contextmanager
    def _dropout_of(self, module: Any, seed: int) -> Iterator[None]:
        """A step's own dropout masks, the same every time that its loss is asked for."""
        if not (self.dropout and module.training):
            yield
            return
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            module.model.train()
            try:
                yield
            finally:
                module.model.eval()

    def _outer(
        self, module: Any, adapted: Parameters, batch: Batch, counts: dict[str, Tensor], outer: Callable[..., StepTerms]
    ) -> tuple[StepTerms, Parameters | None]:
        """The terms at theta' and, in training, v = grad L(theta')."""
        if not module.training:
            with torch.no_grad():
                return with_parameters(module.model, adapted, outer, batch, counts), None
        leaves = {name: value.requires_grad_() for name, value in adapted.items()}
        terms = with_parameters(module.model, leaves, outer, batch, counts)
        gradient = torch.autograd.grad(terms.loss, list(leaves.values()), allow_unused=True)
        zeros = (torch.zeros_like(value) if g is None else g for value, g in zip(leaves.values(), gradient))
        return terms, dict(zip(leaves, zeros))

    def _advance(self, stream: Stream, adapted: Parameters, documents: int) -> None:
        stream.documents += documents
        if stream.documents >= self.reset_every:
            stream.adapted, stream.documents = None, 0
        else:
            stream.adapted = {name: value.detach() for name, value in adapted.items()}

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        stream = self.streams["train"]
        return {"adapted": stream.adapted, "documents": stream.documents, "epoch": stream.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.streams["train"] = Stream(**state)


def _predictions(module: Any, inputs: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the head reads at every token that is not padding [n, H], and its matrix and bias."""
    matrix = matrix_of(head_of(module.model))
    if matrix is None:
        raise ValueError(
            "meta_locality needs the output head's matrix, and the head is more (an adapter, quantised): leave it out "
            "of the adapter's targets, or set meta_locality=0."
        )
    rows = module.hidden_states(inputs).flatten(0, 1)[inputs["attention_mask"].flatten().bool()]
    return (rows, *matrix)


class MetaTokenWeightingMixin:
    """A `CausalLM` that trains a network of token weights, and nothing else.

    Batches hold questions with their answers (`input_ids`, `labels`, `attention_mask`), `documents` that the answers
    are in and `unrelated` text, each a dictionary of `input_ids` and `attention_mask` (`DocumentQuestionData`). Other
    objectives act on the questions' loss. The weights are `token_weights.` in the checkpoint, for
    `OnlineAdaptationMixin`. Logged: `val_loss` after adaptation and `val_unadapted` without.

    Args:
        meta_weight_model: Name of the network whose body makes the weights; by default a copy of the network's own
            body.
        meta_rate: a, the rate of the inner steps.
        meta_locality: c_kl, in front of the KL on unrelated text; 0 leaves it out.
        meta_sequential: A step for each document in turn; else one on all of the batch.
        meta_documents: Documents in a batch.
        meta_reset_every: Documents after which the base is as it was at first.
        meta_dropout: Dropout in the inner steps.
        meta_divide_by_padding: Divide a step by all positions of the padded documents.
    """

    def __init__(
        self,
        *args: Any,
        meta_weight_model: str | None = None,
        meta_rate: float = 5e-4,
        meta_locality: float = 0.1,
        meta_sequential: bool = True,
        meta_documents: int = 6,
        meta_reset_every: int = 24,
        meta_dropout: bool = False,
        meta_divide_by_padding: bool = False,
        **kwargs: Any,
    ) -> None:
        objective = MetaTokenWeighting(
            meta_weight_model,
            meta_rate,
            meta_locality,
            meta_sequential,
            meta_documents,
            meta_reset_every,
            meta_dropout,
            meta_divide_by_padding,
        )
        super().__init__(*args, **kwargs)
        self.meta_weighting = objective
        self.add_objective(objective)  # type: ignore[attr-defined]

    def terms(self, batch: Batch, counts: dict[str, Tensor]) -> StepTerms:
        return self.meta_weighting.terms(self, batch, counts, super().terms)  # type: ignore[misc]

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()  # type: ignore[misc]
        self.meta_weighting.streams["evaluation"] = Stream()

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()  # type: ignore[misc]
        self.meta_weighting.streams["evaluation"] = Stream()


class MetaTokenWeightingCausalLM(MetaTokenWeightingMixin, CausalLM):
    """`CausalLM` that meta-learns token weights, ready for YAML.

    Args:
        *args: The arguments of `CausalLM`.
        **kwargs: Those of `MetaTokenWeightingMixin` and `CausalLM`.
    """
