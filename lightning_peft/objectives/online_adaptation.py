"""Adapting to a stream of documents, their tokens weighted by how much they are worth (CaMeLS, arXiv 2305.15076).

    L = (1/n) sum_t w_t nll_t         w from a weight network that `MetaTokenWeightingMixin` trained, without gradient

One pass over the documents, one at a time; the paper takes Adam at 1e-4 (tuned over 1e-4 / 4^k for each way of
weighting) and clips gradients at 750. Afterwards questions about the documents are asked (`QuestionAnswering`). The
ways that the paper compares with are here too: uniform weights; the tf-idf of each token's word; salient spans, named
entities alone.

The published code divides by all positions of a padded document; here n is its tokens.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.models.causal_lm import CausalLM
from lightning_peft.objectives.meta_weighting import weight_network
from lightning_peft.objectives.objective import Objective

if TYPE_CHECKING:
    from lightning_peft.kernels import Rows
    from lightning_peft.models.fine_tuning_module import FineTuningModule
    from lightning_peft.objectives.objective import Batch

WEIGHTS = ("learned", "uniform", "tfidf", "salient")
#: Kinds of named entities that say when or how much, and not what.
IGNORED_ENTITIES = ("TIME", "PERCENT", "MONEY", "QUANTITY", "ORDINAL", "CARDINAL")
#: A part of a text and its weight: first character, the one behind the last, weight.
Span = tuple[int, int, float]

_WORD = re.compile(r"(?u)\b\w\w+\b")


class TfIdf:
    """tf-idf of the words of a text against a corpus, as scikit-learn's `TfidfVectorizer` has it by default.

    Words are of two characters and more, in lower case; idf = ln((1 + n) / (1 + df)) + 1; a text's scores have length
    1.

    Args:
        corpus: The documents that idf is counted in.
        quantile: Words below this quantile of all scores in the corpus weigh nothing.

    Raises:
        ValueError: The corpus is empty or `quantile` is not in [0, 1).
    """

    def __init__(self, corpus: Sequence[str], quantile: float = 0.0) -> None:
        if not corpus:
            raise ValueError("tf-idf needs documents to count words in, and there is none.")
        if not 0 <= quantile < 1:
            raise ValueError(f"quantile={quantile} must be in [0, 1).")
        self.documents = len(corpus)
        self.frequency = Counter(word for text in corpus for word in set(_words(text)))
        every = [score for text in corpus for score in self.scores(text).values()]
        self.threshold = float(torch.tensor(every).double().quantile(quantile)) if quantile and every else 0.0

    def scores(self, text: str) -> dict[str, float]:
        """The score of each word of the corpus in a text."""
        counts = Counter(word for word in _words(text) if word in self.frequency)
        raw = {w: n * (math.log((1 + self.documents) / (1 + self.frequency[w])) + 1) for w, n in counts.items()}
        length = math.sqrt(sum(score**2 for score in raw.values()))
        return {word: score / length for word, score in raw.items()}

    def __call__(self, text: str) -> list[Span]:
        scores = self.scores(text)
        found = ((m.start(), m.end(), scores.get(m.group().lower(), 0.0)) for m in _WORD.finditer(text))
        return [span for span in found if span[2] > self.threshold]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class SalientSpans:
    """Named entities weigh 1 and everything else 0, but for those that say when or how much.

    Args:
        model: Name of the spaCy pipeline.

    Raises:
        ImportError: spaCy or the pipeline is not installed.
    """

    def __init__(self, model: str = "en_core_web_sm") -> None:
        try:
            import spacy

            self.pipeline: Any = spacy.load(model)
        except (ImportError, OSError) as error:
            raise ImportError(
                f"salient spans are found by spaCy's {model!r}: pip install spacy && python -m spacy download {model}."
            ) from error

    def __call__(self, text: str) -> list[Span]:
        entities = self.pipeline(text).ents
        return [(e.start_char, e.end_char, 1.0) for e in entities if e.label_ not in IGNORED_ENTITIES]


def weights_of_spans(tokenizer: Any, ids: Sequence[int], score: Callable[[str], list[Span]]) -> Tensor:
    """For each token the largest weight of a span that one of its characters lies in, else 0; [time].

    Args:
        tokenizer: A transformers tokenizer.
        ids: Token ids of a text.
        score: Weighs spans of a text.
    """
    ids = [int(i) for i in ids]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    places: list[tuple[int, int]] | None = None
    if getattr(tokenizer, "is_fast", False):
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = list(made["offset_mapping"]) if list(made["input_ids"]) == ids else None
    if places is None:  # token by token, where the text is cut in another way when it is read again
        pieces = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]
        text, ends = "".join(pieces), torch.tensor([len(p) for p in pieces]).cumsum(0).tolist()
        places = list(zip([0, *ends[:-1]], ends))
    characters = torch.zeros(len(text) + 1)
    for begin, end, weight in score(text):
        characters[begin:end] = characters[begin:end].clamp(min=weight)
    return torch.tensor([float(characters[begin:end].max()) if end > begin else 0.0 for begin, end in places])


def document_spans(batch: Batch) -> list[tuple[int, int, int]]:
    """Row, first token and the one behind the last of every document of a batch, packed or padded."""
    if "document_ids" in batch:
        numbers = batch["document_ids"].cpu()
    else:
        numbers = batch["attention_mask"].cpu() - 1  # one document, -1 where there is none
    spans = []
    for row, own in enumerate(numbers):
        for number in own[own >= 0].unique():
            places = (own == number).nonzero().flatten()
            spans.append((row, int(places[0]), int(places[-1]) + 1))
    return spans


class OnlineAdaptation(Objective):
    """Weights each token of a document in training; validation stays unweighted.

    Args:
        adapt_weights: "learned", "uniform", "tfidf" or "salient".
        adapt_checkpoint: For "learned", the checkpoint of a run of `MetaTokenWeightingMixin`.
        adapt_weight_model: The `meta_weight_model` of that run.
        adapt_corpus: For "tfidf", the documents that words are counted in: texts, or a file with one in each line.
        adapt_quantile: For "tfidf", the share of least scores that weigh nothing.
        adapt_entities: For "salient", the spaCy pipeline.

    Raises:
        ValueError: An argument is unknown or missing, or the checkpoint has no weight network.
    """

    def __init__(
        self,
        adapt_weights: str = "learned",
        adapt_checkpoint: str | None = None,
        adapt_weight_model: str | None = None,
        adapt_corpus: list[str] | str | None = None,
        adapt_quantile: float = 0.05,
        adapt_entities: str = "en_core_web_sm",
    ) -> None:
        if adapt_weights not in WEIGHTS:
            raise ValueError(f"adapt_weights={adapt_weights!r} is not known: use one of {WEIGHTS}.")
        if adapt_weights == "learned" and adapt_checkpoint is None:
            raise ValueError(
                "adapt_weights='learned' needs a trained weight network: give adapt_checkpoint=PATH, the checkpoint of "
                "a run of MetaTokenWeightingCausalLM."
            )
        if adapt_weights == "tfidf" and not adapt_corpus:
            raise ValueError("adapt_weights='tfidf' needs adapt_corpus, the documents that words are counted in.")
        self.kind, self.checkpoint, self.weight_model = adapt_weights, adapt_checkpoint, adapt_weight_model
        self._score: Callable[[str], list[Span]] | None = None
        if adapt_weights == "tfidf":
            assert adapt_corpus is not None
            texts = Path(adapt_corpus).read_text().splitlines() if isinstance(adapt_corpus, str) else adapt_corpus
            self._score = TfIdf(texts, adapt_quantile)
        elif adapt_weights == "salient":
            self._score = SalientSpans(adapt_entities)
        self._network: list[nn.Module] = []

    def attach(self, module: FineTuningModule) -> None:
        if not isinstance(module, CausalLM):
            raise ValueError(
                f"OnlineAdaptation weights tokens of a causal language model: {type(module).__name__} is none."
            )
        if self._score is not None and module.tokenizer is None:
            raise ValueError(
                f"adapt_weights={self.kind!r} reads text and needs a tokenizer: pass CausalLM(tokenizer=...)."
            )
        if self.kind != "learned":
            return
        network = weight_network(module.model, self.weight_model)
        loaded = torch.load(str(self.checkpoint), map_location="cpu", mmap=True, weights_only=True).get(
            "state_dict", {}
        )
        prefix = "token_weights."
        state = {key.removeprefix(prefix): value for key, value in loaded.items() if key.startswith(prefix)}
        if state.keys() != network.state_dict().keys():
            raise ValueError(
                f"adapt_checkpoint={str(self.checkpoint)!r} has no weight network of this kind ({len(state)} tensors): "
                "give a checkpoint of MetaTokenWeightingCausalLM, and the adapt_weight_model that it was trained with."
            )
        network.load_state_dict(state)
        self._network = [network.requires_grad_(False).eval()]  # in a list: no part of the module or its checkpoint

    def transform_batch(self, module: FineTuningModule, batch: Batch) -> Batch:
        if self._score is None:
            return batch
        weights = torch.zeros(batch["input_ids"].shape)
        for row, begin, end in document_spans(batch):
            ids = batch["input_ids"][row, begin:end].tolist()
            weights[row, begin:end] = weights_of_spans(module.tokenizer, ids, self._score)
        return {**batch, "token_weight": weights}

    @torch.no_grad()
    def before_forward(self, module: FineTuningModule, batch: Batch) -> Batch:
        if not self._network or not module.training:
            return batch
        device, spans = batch["input_ids"].device, document_spans(batch)
        ids = [batch["input_ids"][row, begin:end] for row, begin, end in spans]
        padded = pad_sequence(ids, batch_first=True) if ids else batch["input_ids"][:0]
        lengths = torch.tensor([len(own) for own in ids], device=device)
        mask = (torch.arange(padded.shape[1], device=device)[None] < lengths[:, None]).long()
        weights = torch.zeros(batch["input_ids"].shape, device=device)
        for (row, begin, end), own in zip(spans, self._network[0].to(device)(padded, mask)):
            weights[row, begin:end] = own[: end - begin]
        return {**batch, "token_weight": weights}

    def loss_weights(self, module: FineTuningModule, batch: Batch, units: Rows) -> Tensor | None:
        if not module.training or self.kind == "uniform":
            return None
        return batch["token_weight"].to(units.nll).flatten()[units.index]  # the weight of the target token


class OnlineAdaptationMixin:
    """Adds `OnlineAdaptation` to a `CausalLM`.

    Args:
        adapt_weights: "learned", "uniform", "tfidf" or "salient".
        adapt_checkpoint: For "learned", the checkpoint of a run of `MetaTokenWeightingMixin`.
        adapt_weight_model: The `meta_weight_model` of that run.
        adapt_corpus: For "tfidf", the documents that words are counted in: texts, or a file with one in each line.
        adapt_quantile: For "tfidf", the share of least scores that weigh nothing.
        adapt_entities: For "salient", the spaCy pipeline.
    """

    def __init__(
        self,
        *args: Any,
        adapt_weights: str = "learned",
        adapt_checkpoint: str | None = None,
        adapt_weight_model: str | None = None,
        adapt_corpus: list[str] | str | None = None,
        adapt_quantile: float = 0.05,
        adapt_entities: str = "en_core_web_sm",
        **kwargs: Any,
    ) -> None:
        objective = OnlineAdaptation(
            adapt_weights, adapt_checkpoint, adapt_weight_model, adapt_corpus, adapt_quantile, adapt_entities
        )
        super().__init__(*args, **kwargs)
        self.add_objective(objective)  # type: ignore[attr-defined]


class OnlineAdaptationCausalLM(OnlineAdaptationMixin, CausalLM):
    """`CausalLM` that adapts to a stream of documents, ready for YAML.

    Args:
        *args: The arguments of `CausalLM`.
        **kwargs: Those of `OnlineAdaptationMixin` and `CausalLM`.
    """
