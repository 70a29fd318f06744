"""PASTA: trainable vectors on the special tokens, and nothing else (paper 113, arXiv 2210.04382).

    h_i <- h_i + v_l^(p)      at the input of block l, where token i is the p-th special token of its row   (eq. 3)

L x P x H parameters: 0.029 % of BERT-large with P = 2. As in the authors' code (luka-group/PASTA), p counts special
tokens by order of occurrence, not by token id: [CLS], the first [SEP] and the second [SEP] have a vector each. Where
that code falls short ours does not follow: it counts in the batch's first row only and has the ids 101 and 102 written
in. Its vectors start normal(0, 0.02) with the network's dropout on them; here they start at zero, so that the network
starts unchanged (`init="normal"` and `dropout` give the former).

For decoders the special tokens are the tokenizer's too: beginning and end of text, chat markers. In generation with a
cache the count goes on from the prompt's (beams of one prompt are taken to hold equally many). Rows of packed documents
count on across documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters import add_peft_type, register_with_peft
from lightning_peft.adapters.beside import BesideConfig, BesideLayer, BesideModel, first_tensor, with_first
from lightning_peft.sublayers import sublayers, unwrapped

SHARES, INITS = ("order", "token"), ("zeros", "normal")


@dataclass
class SpecialTokensConfig(BesideConfig):
    """Vectors added to the hidden states of special tokens at the input of every block (PASTA).

    Args:
        positions: P, how many special tokens of a row have a vector, with `share="order"`: 2 for single sentences in
            BERT's format, 3 for pairs.
        share: "order": the p-th special token of a row has the p-th vector, as in the paper's code; "token": one vector
            a token id, wherever it occurs.
        token_ids: Ids of the special tokens.
        tokenizer: Where to read them from if `token_ids` is not given: hub name or folder of a tokenizer, by default
            the network's own name. Padding, unknown and mask tokens are left out.
        init: "zeros" or "normal" (standard deviation 0.02).
        dropout: Dropout on the vectors.
        layers_to_transform: Positions of the blocks that get vectors, from 0 (in an encoder-decoder, in each of the two
            stacks); by default all.
        modules_to_save: Names of modules that train whole, besides the task's own heads.

    Raises:
        ValueError: A value is out of its range, or the tokenizer has no special tokens.
    """

    positions: int = 3
    share: Literal["order", "token"] = "order"
    token_ids: list[int] | None = None
    tokenizer: str | None = None
    init: Literal["zeros", "normal"] = "zeros"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("special_tokens")
        for name, known in (("share", SHARES), ("init", INITS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use one of {known}.")
        if self.positions < 1:
            raise ValueError(f"positions={self.positions} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if self.token_ids is not None:
            self.token_ids = sorted({int(i) for i in self.token_ids})
            if not self.token_ids:
                raise ValueError("token_ids=[] names no special token: leave it out to read them from the tokenizer.")

    @property
    def vectors(self) -> int:
        """Vectors of a block."""
        return self.positions if self.share == "order" else len(self.token_ids or ())


def special_token_ids(tokenizer: Any) -> list[int]:
    """Ids of a tokenizer's special tokens without those for padding, unknown words and masks.

    A padding token that is also the end of text counts as the latter.

    Raises:
        ValueError: It has none.
    """
    left_out = {tokenizer.unk_token_id, getattr(tokenizer, "mask_token_id", None)}
    if tokenizer.pad_token_id not in (tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)):
        left_out.add(tokenizer.pad_token_id)
    found = sorted(set(tokenizer.all_special_ids) - left_out)
    if not found:
        raise ValueError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no special tokens for vectors to sit on: "
            "give token_ids=[...] of tokens that occur in every row."
        )
    return found


def special_slots(
    input_ids: Tensor,
    token_ids: Tensor,
    vectors: int,
    share: str = "order",
    attention_mask: Tensor | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which vector each token gets.

    Args:
        input_ids: [batch, time].
        token_ids: Ids of the special tokens, ascending, [K].
        vectors: P.
        share: "order" or "token".
        attention_mask: [batch, time]; what is masked does not count. `None` if nothing is.
        before: Special tokens before these in each row, [batch]; by default none.

    Returns:
        The vector's number for each token, P for "none" [batch, time], and special tokens so far [batch].

    Raises:
        ValueError: A row has more special tokens than there are vectors.
    """
    matches = input_ids[..., None] == token_ids.to(input_ids.device)  # [batch, time, K]
    special = matches.any(-1)
    if attention_mask is not None:
        special = special & attention_mask.bool()
    count = special.sum(1) if before is None else before + special.sum(1)
    if share == "token":
        return torch.where(special, matches.int().argmax(-1), vectors), count
    order = special.cumsum(1) - 1 + (0 if before is None else before[:, None])
    most = int(count.max()) if len(count) else 0  # waits for the device, once a forward of the network
    if most > vectors:
        raise ValueError(
            f"a row holds {most} special tokens and there are vectors for positions={vectors}: set positions={most}, "
            "or share='token' for one vector a token id."
        )
    return torch.where(special, order, vectors), count


class Slots:
    """The slots of one forward of a stack, computed once where the ids are embedded and read by every block.

    Args:
        config: The adapter's.
    """

    def __init__(self, config: SpecialTokensConfig) -> None:
        self.token_ids = torch.tensor(config.token_ids)
        self.vectors, self.share = config.vectors, config.share
        self.slots: Tensor | None = None
        self.mask: Tensor | None = None
        self.past = self.seen = 0
        self.count: Tensor | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the stack's owner: forgets the last forward, looks for mask and cache."""
        self.slots = None
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        self.past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the embedding.

        Raises:
            ValueError: A cache goes on from tokens that this has not seen.
        """
        ids = args[0]
        counts = self.share == "order"  # by order of occurrence, which a cache cuts off
        if counts and self.past and (self.past != self.seen or self.count is None or len(self.count) != len(ids)):
            raise ValueError(
                f"the cache holds {self.past} tokens and the special tokens among them are not known here: start from "
                "the whole rows, or set share='token'."
            )
        mask = None if self.mask is None else self.mask[:, -ids.shape[1] :]
        before = self.count if self.past and counts else None
        self.slots, self.count = special_slots(ids, self.token_ids, self.vectors, self.share, mask, before)
        self.seen = self.past + ids.shape[1]

    def take(self, hidden: Tensor) -> Tensor:
        """The slots for a block's input [batch, time, width].

        Raises:
            ValueError: The ids were not embedded in this forward.
        """
        if self.slots is None or self.slots.shape != hidden.shape[:2]:
            raise ValueError(
                "special-token vectors need input_ids, to know which tokens are special: the network was given "
                "inputs_embeds (or prompt learning did so)."
            )
        return self.slots


class SpecialTokensAdapter(nn.Module):
    """v of one block, [P, width].

    Args:
        width: Size of the residual stream.
        config: The rest.
    """

    def __init__(self, width: int, config: SpecialTokensConfig) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(config.vectors, width))
        if config.init == "normal":
            nn.init.normal_(self.vectors, std=0.02)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, slots: Tensor) -> Tensor:
        """What is added, [batch, time, width]: zero but at special tokens."""
        table = torch.cat([self.vectors, self.vectors.new_zeros(1, self.vectors.shape[1])])
        return self.dropout(F.embedding(slots, table))


class Place(NamedTuple):
    """A block.

    Args:
        width: Size of its residual stream.
        owner: Module that embeds the ids and runs the block's stack.
        embedding: The embedding of the ids.
    """

    width: int
    owner: str
    embedding: str


class SpecialTokensLayer(BesideLayer):
    """A block whose input has vectors added to it at special tokens."""

    adapter_layer_names = ("special_tokens_adapters",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.slots: dict[str, Slots] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = first_tensor(args, kwargs)
        for name, adapter in self.active():
            hidden = hidden + adapter(self.slots[name].take(hidden)).to(hidden.dtype)
        args, kwargs = with_first(args, kwargs, hidden)
        return self.base_layer(*args, **kwargs)


class SpecialTokensModel(BesideModel):
    """The tuner of `SpecialTokensConfig`."""

    prefix = "special_tokens_"
    tuner_layer_cls = layer_class = SpecialTokensLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.token_ids is None:
            peft_config.token_ids = self._ids(peft_config)
        return peft_config

    def _ids(self, config: SpecialTokensConfig) -> list[int]:
        from lightning_peft.models.pretrained import load_tokenizer

        name = config.tokenizer or getattr(self.model, "name_or_path", "")
        try:
            if not name:
                raise OSError("the network has no name")
            tokenizer = load_tokenizer(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"special tokens: there is no tokenizer to read their ids from ({error}): give tokenizer=HUB_NAME_OR_"
                "FOLDER or token_ids=[...]."
            ) from error
        return special_token_ids(tokenizer)

    def find_places(self, config: SpecialTokensConfig, network: nn.Module) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for part in sublayers(network):
            if part.block not in places and config.transforms(part.index):
                places[part.block] = Place(part.width, *_embedding_of(part.block, network))
        return places

    def adapter_for(self, config: SpecialTokensConfig, place: Place) -> SpecialTokensAdapter:
        return SpecialTokensAdapter(place.width, config)

    def connect(self, layer: SpecialTokensLayer, adapter_name: str, config: SpecialTokensConfig) -> None:
        place = layer.places[adapter_name]
        for other in self.model.modules():  # blocks of one stack share their slots
            known = isinstance(other, SpecialTokensLayer) and adapter_name in other.slots
            if known and other.places[adapter_name].owner == place.owner:
                layer.slots[adapter_name] = other.slots[adapter_name]
                return
        slots = layer.slots[adapter_name] = Slots(config)
        owner = self.model.get_submodule(place.owner)
        embedding = unwrapped(self.model.get_submodule(place.embedding))
        layer.hooks.append(owner.register_forward_pre_hook(slots.begin, with_kwargs=True))
        layer.hooks.append(embedding.register_forward_pre_hook(slots.read))


def _embedding_of(block: str, network: nn.Module) -> tuple[str, str]:
    """Names of the module around a block that embeds ids, and of its embedding."""
    names = {id(module): name for name, module in network.named_modules()}
    name = block
    while name:
        name = name.rpartition(".")[0]
        owner: Any = network.get_submodule(name)
        if not hasattr(owner, "get_input_embeddings"):
            continue
        try:
            embedding = owner.get_input_embeddings()
        except NotImplementedError:
            continue
        if isinstance(embedding, nn.Module) and isinstance(unwrapped(embedding), nn.Embedding):
            return name, names[id(embedding)]
    raise ValueError(
        f"{type(network).__name__} embeds no token ids around {block}, so there are no special tokens to sit on."
    )


register_with_peft()
