"""Self-distilled answers: those of the network alone, cached by what they depend on, resumable, and masked right."""

import copy
import json

import lightning.pytorch as L
import pytest
import torch

from lightning_peft.datamodules.answers import (
    cached_answers,
    generate_answers,
    prompt_ids,
)
from lightning_peft.datamodules.self_distillation import SelfDistillationData
from lightning_peft.network_record import network_fingerprint
from tests.tiny import tiny_llama, tiny_tokenizer

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"]
CHAT = [
    {"messages": [{"role": "user", "content": f"{word} " * n}, {"role": "assistant", "content": "never"}]}
    for n, word in enumerate(WORDS, 1)
]


def greedy(network, ids, n):
    """One prompt, no padding, no cache."""
    made = []
    for _ in range(n):
        made.append(int(network(torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax()))
        if made[-1] == 4:
            return made[:-1], True
    return made, False


def test_greedy_answers_are_those_of_each_prompt_alone():
    network, tokenizer = tiny_llama().eval(), tiny_tokenizer()
    network.lm_head.weight.data[4] *= 1.3  # the end of the turn comes up now and then
    prompts = [prompt_ids(tokenizer, row["messages"][:1]) for row in CHAT]
    assert tokenizer.decode(prompts[0]).endswith("<|im_start|> assistant \n")
    answers = generate_answers(network, tokenizer, prompts, 4, {"max_new_tokens": 12, "do_sample": False}, seed=0)
    expected = [greedy(network, ids, 12) for ids in prompts]
    assert [one["finished"] for one in answers] == [finished for _, finished in expected]
    assert {finished for _, finished in expected} == {True, False}
    assert [one["answer"] for one in answers] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in expected
    ]


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    network, tokenizer = tiny_llama().eval(), tiny_tokenizer()
    options = {"max_new_tokens": 6, "do_sample": True}
    before = torch.get_rng_state()
    first, again, other = (generate_answers(network, tokenizer, [[9, 10]], 1, options, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other


def _shards(folder, made, fail_at=None, **kwargs):
    def answer(prompts, number):
        if number == fail_at:
            raise KeyboardInterrupt
        made.append(number)
        return [{"answer": f"{number}:{prompt}", "finished": True} for prompt in prompts]

    return cached_answers(folder, [[i] for i in range(11)], answer, {"x": 1}, shard_size=3, **kwargs)


def test_shards_survive_a_kill_and_any_number_of_ranks(tmp_path):
    whole = _shards(tmp_path / "whole", made := [])
    assert made == [0, 1, 2, 3]
    assert [row["answer"] for row in whole][::5] == ["0:[0]", "1:[5]", "3:[10]"]
    with pytest.raises(KeyboardInterrupt):
        _shards(tmp_path / "killed", [], fail_at=2)
    (next((tmp_path / "killed").iterdir()) / ".shard-00002.parquet.99").write_text("half")
    assert _shards(tmp_path / "killed", made := []) == whole
    assert made == [2, 3]
    assert _shards(tmp_path / "killed", made := []) == whole
    assert made == []
    other = []
    ranks = _shards(
        tmp_path / "ranks",
        made := [],
        rank=0,
        ranks=2,
        barrier=lambda: _shards(tmp_path / "ranks", other, rank=1, ranks=2),
    )
    assert ranks == whole
    assert (made, other) == ([0, 2], [1, 3])


def test_fingerprint_of_a_network():
    network = tiny_llama()
    own = network_fingerprint(network)
    assert network_fingerprint(copy.deepcopy(network)) == own
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight.add_(1e-4)
    assert network_fingerprint(network) != own


class Module(L.LightningModule):
    """What the data need of a module: `model` and `tokenizer`."""

    def __init__(self, model):
        super().__init__()
        self.model, self.tokenizer = model, tiny_tokenizer()

    def training_step(self, batch, batch_idx):
        return self.model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, network=None, steps=2, **kwargs):
    torch.manual_seed(1)
    kwargs = {"generation": {"max_new_tokens": 5}, "unfinished": "keep", "batch_size": 4, "shard_size": 4, **kwargs}
    kwargs = {"data": CHAT, "cache_dir": str(tmp_path), **kwargs}
    module = Module(network or tiny_llama(dropout=0.2))
    made = SelfDistillationData(**kwargs)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, made)
    return module, made


def _folders(tmp_path):
    return sorted((tmp_path / "self_distillation").iterdir())


def test_in_a_fit_rows_are_the_networks_own_answers_with_the_prompt_masked(tmp_path):
    _, made = fit(tmp_path)
    rows, tokenizer, network = made.rows("train"), tiny_tokenizer(), tiny_llama().eval()
    for row, given in zip(rows, CHAT, strict=True):
        prompt = prompt_ids(tokenizer, given["messages"][:1])
        answer, _ = greedy(network, prompt, 5)
        # The tiny network also says special tokens, which an answer's text does not keep.
        text = tokenizer.decode(answer, skip_special_tokens=True)
        expected = tokenizer(f"{text} <|im_end|>")["input_ids"]
        assert row["input_ids"][: len(prompt)].tolist() == prompt
        assert row["labels"][row["labels"] != -100].tolist() == expected
        assert (row["labels"][: len(prompt)] == -100).all()
    (folder,) = _folders(tmp_path)
    assert len(list(folder.glob("shard-*.parquet"))) == 3
    assert json.loads((folder / "settings.json").read_text())["generation"] == {"max_new_tokens": 5, "do_sample": False}


def test_a_warm_cache_changes_nothing_and_generates_nothing(tmp_path):
    cold, _ = fit(tmp_path)
    times = [path.stat().st_mtime_ns for path in sorted(_folders(tmp_path)[0].glob("shard-*"))]
    warm, _ = fit(tmp_path)
    assert [path.stat().st_mtime_ns for path in sorted(_folders(tmp_path)[0].glob("shard-*"))] == times
    for a, b in zip(cold.parameters(), warm.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(module.training for module in warm.model.modules())


@pytest.mark.parametrize(
    "change",
    [
        {"generation": {"max_new_tokens": 4}},
        {"seed": 3},
        {"data": CHAT[1:]},
        {"network": tiny_llama(rms_norm_eps=1e-6, hidden=16)},
        {"generation_batch_size": 2},
    ],
)
def test_the_cache_knows_what_answers_depend_on(change, tmp_path):
    fit(tmp_path, steps=1)
    fit(tmp_path, steps=1, **change)
    assert len(_folders(tmp_path)) == 2


def test_plain_prompts_further_columns_and_held_out_rows(tmp_path):
    rows = [{"prompt": f"{word} ", "weight": float(n)} for n, word in enumerate(WORDS, 1)]
    _, made = fit(tmp_path, data=rows, validation=0.3)
    assert len(made.rows("train")) == 8
    assert len(made.rows("validation")) == 3
    for row in made.rows("train"):
        word = WORDS[int(row["weight"]) - 1]
        assert tiny_tokenizer().decode(row["input_ids"][:1]) == word
        assert row["labels"][0] == -100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"generation": {"max_new_tokens": 1, "suppress_tokens": [4]}, "unfinished": "drop"},
            "none of 11 train prompts has a finished answer",
        ),
        ({"max_length": 8}, r"11 of 11 train prompts \(rows 0, 1, 2, 3, 4\) fill max_length=8"),
        ({"data": [{"text": "a"}]}, r"columns \['text'\]: give 'messages' or 'prompt'"),
        ({"data": [{"messages": [{"role": "assistant", "content": "b"}]}]}, "no turn before the assistant's"),
        ({"unfinished": "cut"}, "unfinished='cut'"),
        ({"streaming": True}, "streaming=True"),
    ],
)
def test_bad_inputs(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, **arguments)


def test_without_a_network():
    made = SelfDistillationData(CHAT, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="no network to answer"):
        made.setup("fit")
