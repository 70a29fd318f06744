"""MRR@k and recall@k against torchmetrics' retrieval metrics, over batches, and as TextEncoder logs them."""

from __future__ import annotations

import itertools

import lightning.pytorch as L
import pytest
import torch
from torchmetrics.retrieval import RetrievalMRR, RetrievalRecall

from lightning_peft.datamodules import TextPairData
from lightning_peft.models import TextEncoder
from lightning_peft.models.retrieval_metrics import RetrievalRank, ranks_of
from tests.tiny import tiny_bert, tiny_tokenizer


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize(("measure", "peer"), [("mrr", RetrievalMRR), ("recall", RetrievalRecall)])
def test_equals_torchmetrics(measure, peer, k):
    queries, documents = torch.randn(2, 25, 4)
    documents += queries / 2
    made = RetrievalRank(measure, k)
    for start in (0, 10, 20):
        made.update(queries[start : start + 10], documents[start : start + 10])
    n = len(queries)
    index = torch.arange(n)[:, None].expand(n, n)
    expected = peer(top_k=k)(queries @ documents.T, torch.eye(n, dtype=torch.bool), indexes=index)
    torch.testing.assert_close(made.compute(), expected)


def test_vectors_that_are_all_alike_find_nothing():
    assert ranks_of(torch.ones(5, 3), torch.ones(5, 3)).tolist() == [5] * 5


def test_more_queries_than_a_chunk(monkeypatch):
    monkeypatch.setattr("lightning_peft.models.retrieval_metrics.CHUNK", 4)
    queries, documents = torch.randn(2, 11, 3)
    scores = queries @ documents.T
    expected = [(row >= row[i]).sum().item() for i, row in enumerate(scores)]
    assert ranks_of(queries, documents).tolist() == expected


def test_an_encoder_logs_them_over_the_whole_validation_set(tmp_path):
    words = list("abcdefghijk")
    rows = [{"query": word, "document": other} for word, other in itertools.pairwise(words)]
    data = TextPairData(rows, validation=rows, tokenizer=tiny_tokenizer(), batch_size=3)
    module = TextEncoder(tiny_bert(head="BertModel")).eval()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    logged = trainer.validate(module, data, verbose=False)[0]
    vectors = [
        torch.cat([module.embed(batch[side]) for batch in data.val_dataloader()]) for side in ("query", "document")
    ]
    ranks = ranks_of(*vectors)
    assert logged["val_recall@1"] == pytest.approx((ranks == 1).float().mean().item())
    assert logged["val_mrr@10"] == pytest.approx((1 / ranks).where(ranks <= 10, 0.0).mean().item())


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="measure='ndcg'"):
        RetrievalRank("ndcg")
    with pytest.raises(ValueError, match="k=0"):
        RetrievalRank(k=0)
