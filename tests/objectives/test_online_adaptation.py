"""Online adaptation with token weights (paper 81): tf-idf against scikit-learn, spans to tokens, learned weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_peft.datamodules.collate import collate
from lightning_peft.datamodules.packing import packed_row
from lightning_peft.models import CausalLM, ImageClassifier
from lightning_peft.objectives import MetaTokenWeightingCausalLM, OnlineAdaptation, OnlineAdaptationCausalLM
from lightning_peft.objectives.online_adaptation import TfIdf, document_spans, weights_of_spans
from tests.models.test_causal_lm import counts_of, quiet_trainer
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer, tiny_vit

CORPUS = [
    "The cat sat on the mat; the dog did not.",
    "A dog and a cat: yes, a cat! Numbers 42 and 7.",
    "Questions without answers, answers without questions.",
    "x y",
]


@pytest.mark.parametrize("quantile", [0.0, 0.3])
def test_tfidf_is_that_of_scikit_learn(quantile):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    theirs = text.TfidfVectorizer().fit(CORPUS)
    matrix = theirs.transform(CORPUS).toarray()
    ours = TfIdf(CORPUS, quantile)
    threshold = np.quantile(matrix[matrix != 0], quantile) if quantile else 0.0
    assert ours.threshold == pytest.approx(threshold)
    for new in [*CORPUS, "The unknown cat answers the dog."]:
        row = theirs.transform([new]).toarray()[0]
        expected = {name: score for name, score in zip(theirs.get_feature_names_out(), row) if score}
        assert ours.scores(new) == pytest.approx(expected)
        for begin, end, score in ours(new):
            assert score == pytest.approx(expected[new[begin:end].lower()])
            assert score > threshold - 1e-9
    assert len(ours(CORPUS[2])) == 6


def test_a_token_weighs_what_its_heaviest_character_does():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the cat sat on the mat")["input_ids"]
    spans = [(4, 11, 0.5), (9, 11, 0.8), (20, 22, 0.3)]  # "cat sat", "at", "t" and what follows
    made = weights_of_spans(tokenizer, ids, lambda text: spans)
    torch.testing.assert_close(made, torch.tensor([0, 0.5, 0.8, 0, 0, 0.3]))

    class Slow:
        """Says no characters, and has subwords."""

        is_fast = False

        def decode(self, ids, clean_up_tokenization_spaces=True):
            return "".join({1: "Par", 2: "is", 3: " lies"}[i] for i in ids)

    made = weights_of_spans(Slow(), [1, 2, 3], lambda text: [(0, 4, 1.0)])
    assert text_of(Slow()) == "Paris lies"
    assert made.tolist() == [1, 1, 0]


def text_of(tokenizer) -> str:
    return tokenizer.decode([1, 2, 3])


def batch_of() -> dict:
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(text)["input_ids"] for text in ("the cat sat on the mat", "yes cat", "dog no dog")]
    return collate([{"input_ids": ids, "labels": ids} for ids in rows], 0)


def adaptation(network=None, **kwargs) -> OnlineAdaptationCausalLM:
    options = {"adapt_weights": "tfidf", "adapt_corpus": CORPUS, "adapt_quantile": 0.0, "tokenizer": tiny_tokenizer()}
    return OnlineAdaptationCausalLM(network or tiny_llama(), **{**options, **kwargs})


def loss_by_hand(network, batch, weights) -> torch.Tensor:
    logits = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return (weights[:, 1:] * nll).sum() / (batch["labels"][:, 1:] != -100).sum()


def test_a_weight_multiplies_the_loss_of_its_own_token():
    module = adaptation()
    batch = module.transform_batch(batch_of())
    scores = TfIdf(CORPUS)
    words = {"the": "the cat sat on the mat", "cat": "the cat sat on the mat"}
    for place, word in ((0, "the"), (1, "cat"), (4, "the")):
        assert float(batch["token_weight"][0, place]) == pytest.approx(scores.scores(words[word])[word])
    assert (batch["token_weight"][batch["attention_mask"] == 0] == 0).all()
    terms = module.terms(batch, counts_of(module, batch))
    expected = loss_by_hand(module.model, batch, batch["token_weight"])
    torch.testing.assert_close(terms.loss, expected)
    parameters = list(module.model.parameters())
    ours = torch.autograd.grad(terms.loss, parameters)
    for a, b in zip(ours, torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    module.eval()  # validation is the plain loss
    plain = CausalLM(module.model).eval()
    assert torch.equal(
        module.terms(batch, counts_of(module, batch)).loss, plain.terms(batch, counts_of(plain, batch)).loss
    )


@pytest.mark.parametrize("kind", ["learned", "tfidf"])
def test_packed_documents_have_the_weights_of_documents_apart(tmp_path, kind):
    module = adaptation(adapt_weights=kind, adapt_checkpoint=trained(tmp_path))
    rows = [{"input_ids": np.array(ids), "labels": np.array(ids)} for ids in ([20, 21, 22], [30, 31, 32, 33], [40, 41])]
    apart = collate(rows, 0)
    packed = collate([packed_row(rows[:2]), packed_row(rows[2:])], 0)
    assert document_spans(packed) == [(0, 0, 3), (0, 3, 7), (1, 0, 2)]
    made = []
    for batch in (apart, packed):
        batch = module.before_forward(module.transform_batch(batch))
        made.append(torch.cat([batch["token_weight"][row, b:e] for row, b, e in document_spans(batch)]))
    torch.testing.assert_close(*made)


def trained(path, build=tiny_llama) -> str:
    """A checkpoint of a weight network that weighs tokens differently."""
    torch.manual_seed(0)
    module = MetaTokenWeightingCausalLM(build(), meta_documents=1, meta_reset_every=1)
    torch.nn.init.normal_(module.token_weights.outer.weight)
    ids = torch.randint(5, 128, (1, 6))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loader = torch.utils.data.DataLoader([{**text, "labels": ids, "documents": text}], batch_size=None)
    trainer = quiet_trainer(path, max_steps=1)
    trainer.fit(module, loader)
    trainer.save_checkpoint(path / "weights.ckpt")
    return str(path / "weights.ckpt")


def test_learned_weights_are_the_trained_networks_and_stay(tmp_path):
    checkpoint = trained(tmp_path)
    module = adaptation(adapt_weights="learned", adapt_checkpoint=checkpoint)
    again = MetaTokenWeightingCausalLM.load_from_checkpoint(checkpoint, model=tiny_llama()).eval()
    batch = batch_of()
    with torch.no_grad():
        weights = again.token_weights(batch["input_ids"], batch["attention_mask"])
    assert float(weights.max()) > 1.2 * float(weights[weights > 0].min())
    terms = module.terms(batch, counts_of(module, batch))
    torch.testing.assert_close(terms.loss, loss_by_hand(module.model, batch, weights))
    assert not any("body" in name or "weights" in name for name in module.state_dict())
    terms.loss.backward()
    assert all(p.grad is None for p in module.objectives[0]._network[0].parameters())


def test_uniform_weights_are_plain_fine_tuning():
    module, batch = adaptation(adapt_weights="uniform"), batch_of()
    plain = CausalLM(module.model)
    assert torch.equal(
        module.terms(batch, counts_of(module, batch)).loss, plain.terms(batch, counts_of(plain, batch)).loss
    )


def test_what_it_needs_is_said(tmp_path):
    for given, message in (
        ({"adapt_weights": "best"}, "adapt_weights='best'"),
        ({"adapt_weights": "learned"}, "give adapt_checkpoint=PATH"),
        ({"adapt_corpus": None}, "needs adapt_corpus"),
        ({"adapt_quantile": 1.0}, "quantile=1.0"),
        ({"tokenizer": None}, "needs a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            adaptation(**given)
    with pytest.raises(ValueError, match="has no weight network of this kind"):
        adaptation(adapt_weights="learned", adapt_checkpoint=trained(tmp_path, tiny_gpt2))
    with pytest.raises(ValueError, match="ImageClassifier is none"):
        ImageClassifier(tiny_vit(), objectives=[OnlineAdaptation("uniform")])
    with pytest.raises(ImportError, match="python -m spacy download"):
        adaptation(adapt_weights="salient", adapt_entities="no_such_pipeline")
