"""A document's labels are those without a prompt, the prompt's are masked, and cuts fall on the document alone."""

import itertools
import pickle

import datasets
import lightning.pytorch as L
import numpy as np
import pytest
import torch

from lightning_peft.datamodules.chat_template import tokenize_text
from lightning_peft.datamodules.contextual import PROMPTS, ContextualData, ContextualPromptTransform
from lightning_peft.datamodules.instruction_data import InstructionData
from lightning_peft.models import CausalLM
from tests.datamodules.subwords import subword_tokenizer
from tests.tiny import tiny_llama, tiny_tokenizer

DOCUMENTS = [{"text": " ".join(f"w{(7 * i + j) % 40}" for j in range(3 + i % 5))} for i in range(10)]
ASKED = ["question", "answer yes", "hello good world"]
TOKENIZER = tiny_tokenizer()


def joined(parts):
    return list(itertools.chain.from_iterable(parts))


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def data(rows=DOCUMENTS, **kwargs):
    kwargs = {"prompts": ASKED, "tokenizer": tiny_tokenizer(), "batch_size": 4, **kwargs}
    made = ContextualData(rows, **kwargs)
    made.setup("fit")
    return made


def epochs(made, numbers):
    """The rows of some epochs as (ids, labels), by document order."""
    rows = made.rows("train")
    return [
        [(rows[i + e * len(rows)]["input_ids"], rows[i + e * len(rows)]["labels"]) for i in range(len(rows))]
        for e in numbers
    ]


def test_literal():
    made = ContextualPromptTransform(TOKENIZER, ["question"], separator=" \n ")({"text": "a b"})
    assert made["input_ids"] == ids("question \n a b <|im_end|>")
    assert made["labels"] == [-100, -100, *ids("a b <|im_end|>")]
    learnt = ContextualPromptTransform(TOKENIZER, ["question"], separator=" \n ", loss_on_prompt=True)({"text": "a b"})
    assert learnt["labels"] == learnt["input_ids"] == made["input_ids"]
    joined = ContextualPromptTransform(TOKENIZER, [""])({"prompt": "a ", "completion": "b"})
    assert joined["input_ids"] == joined["labels"] == ids("a b <|im_end|>")


@pytest.mark.parametrize("bos", [False, True])
def test_the_labels_of_a_document_are_those_without_a_prompt(bos):
    tokenizer = subword_tokenizer(["some words of a document, and of prompts"], bos=bos)
    # Tokenised together, the blank would join the two.
    transform = ContextualPromptTransform(tokenizer, ["Think of words"], separator="")
    for text in ("some words of a document", " of prompts", "é🙂"):
        alone, made = tokenize_text(tokenizer, text), transform({"text": text})
        assert [label for label in made["labels"] if label != -100] == alone["labels"]
        prompt = tokenizer("Think of words", add_special_tokens=False)["input_ids"]
        assert made["input_ids"] == [1] * bos + prompt + alone["input_ids"][bos:]


def test_prompts_cost_nothing():
    """nll on the prompt's positions is 0, and its labels have no gradient: the loss is the document's mean."""
    module = CausalLM(tiny_llama(), tokenizer=tiny_tokenizer())
    batch = next(iter(data(sampling="per_example").train_dataloader()))
    masked = batch["labels"] == -100
    assert masked[:, 0].all()
    counts = {name: torch.tensor(float(n)) for name, n in module.counts(batch).items()}
    loss = module.terms(batch, counts).loss
    logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    torch.testing.assert_close(loss, nll[~masked[:, 1:]].mean())


def test_prompts_differ_between_epochs_and_are_those_of_the_seed():
    first, second, again = epochs(data(seed=1), (0, 1, 0))
    assert first == again == epochs(data(seed=1), (0,))[0]
    assert first != second
    other = epochs(data(seed=2), (0,))[0]
    assert other != first
    for rows in (first, second, other):
        for (tokens, labels), document in zip(rows, DOCUMENTS):
            prompt = TOKENIZER.decode(tokens[: labels.count(-100)])
            assert prompt.removesuffix(" \n \n") in ASKED
            assert tokens[labels.count(-100) :] == tokenize_text(TOKENIZER, document["text"])["input_ids"]
    # All strategies are used, about equally often.
    many = data([{"text": f"w{i % 40} w{i // 40}"} for i in range(300)])
    drawn = [labels.count(-100) for rows in epochs(many, (0, 1)) for _, labels in rows]
    counts = np.bincount(drawn)[3:6]
    assert counts.sum() == 600
    assert ((counts - 200) ** 2 / 200).sum() < 9.21  # chi-square, 2 degrees of freedom, 1%
    once = data(sampling="per_example", seed=1)
    assert [TOKENIZER.decode(row["input_ids"]) for row in once.rows("train")] == [TOKENIZER.decode(t) for t, _ in first]


@pytest.mark.parametrize("sampling", ["per_epoch", "per_example"])
def test_truncation_cuts_the_document_and_never_the_prompt(sampling):
    made = data(max_length=8, overlong="truncate", sampling=sampling)
    rows = made.rows("train")
    for i, document in enumerate(DOCUMENTS):
        tokens, labels = list(rows[i]["input_ids"]), list(rows[i]["labels"])
        whole = tokenize_text(TOKENIZER, document["text"])["input_ids"]
        prompt = labels.count(-100)
        assert TOKENIZER.decode(tokens[:prompt]).removesuffix(" \n \n") in ASKED
        assert tokens[prompt:] == whole[: 8 - prompt]


@pytest.mark.parametrize("prompt_on", ["every_chunk", "first_chunk"])
def test_a_long_document_is_learnt_whole_in_even_chunks(prompt_on):
    words = [f"w{i}" for i in range(30)]
    made = data(
        [{"text": " ".join(words)}, {"text": "a b"}],
        max_length=16,
        prompt_on=prompt_on,
        validation=[{"text": " ".join(words[1:])}],
    )
    (rows,) = epochs(made, (3,))
    assert len(rows) == 4  # 31 tokens with their end, 11 of them fit beside the longest prompt
    learnt = [[token for token in labels if token != -100] for _, labels in rows]
    assert joined(learnt[:3]) == tokenize_text(TOKENIZER, " ".join(words))["input_ids"]
    assert sorted(map(len, learnt[:3])) == [10, 10, 11]
    prompts = [labels.count(-100) > 0 for _, labels in rows]
    assert prompts == ([True] * 4 if prompt_on == "every_chunk" else [True, False, False, True])
    held_out = [row["labels"].tolist() for row in made.rows("validation")]
    assert joined(held_out) == tokenize_text(TOKENIZER, " ".join(words[1:]))["input_ids"], "without prompts"
    assert max(map(len, held_out)) <= 16


def test_chunks_keep_the_token_that_begins_a_text():
    tokenizer = subword_tokenizer(["a"], bos=True)
    made = data([{"text": "abcdefghij"}], tokenizer=tokenizer, max_length=9, prompts=["xy"], separator="")
    (rows,) = epochs(made, (0,))
    prompt = [1, *tokenizer("xy", add_special_tokens=False)["input_ids"]]
    assert [tokens[:3] for tokens, _ in rows] == [prompt] * 2
    assert joined(tokens[3:] for tokens, _ in rows) == [
        *tokenizer("abcdefghij", add_special_tokens=False)["input_ids"],
        4,
    ]


def test_overlong_documents_dropped_or_refused():
    made = data(max_length=10, overlong="drop")
    assert [len(labels) - labels.count(-100) for _, labels in epochs(made, (0,))[0]] == [4, 5, 4, 5]
    with pytest.raises(ValueError, match="a document has 6 tokens, and behind its prompt max_length=10 leaves 5"):
        data(max_length=10, overlong="raise")
    with pytest.raises(ValueError, match="overlong='drop' leaves none of 10 train documents"):
        data(max_length=7, overlong="drop")


@pytest.mark.parametrize("sampling", ["per_epoch", "per_example"])
def test_an_empty_prompt_is_continued_pre_training_to_the_bit(sampling, tmp_path):
    options = {"tokenizer": tiny_tokenizer(), "batch_size": 4, "max_length": 6, "overlong": "truncate"}
    weights = []
    for made in (
        ContextualData(DOCUMENTS, prompts=[""], sampling=sampling, **options),
        InstructionData(DOCUMENTS, **options),
    ):
        torch.manual_seed(0)
        module = CausalLM(tiny_llama(dropout=0.1), tokenizer=tiny_tokenizer(), learning_rate=0.01)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, made)
        weights.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(weights[0], tiny_llama().parameters()))


def test_packing_keeps_a_prompt_with_its_document():
    made = data(sampling="per_example", packing=True, max_length=24)
    documents = set()
    for i in range(len(made.rows("train"))):
        row = made.rows("train")[i]
        for number in range(row["document_ids"].max() + 1):
            documents.add(TOKENIZER.decode(row["input_ids"][row["document_ids"] == number]))
    apart = data(sampling="per_example", max_length=24).rows("train")
    assert documents == {TOKENIZER.decode(row["input_ids"]) for row in apart}
    assert len(made.rows("train")) < len(apart) == len(documents)


def test_prompts_by_domain_and_by_document():
    rows = [{"text": text, "domain": domain, "own": None} for text, domain in (("a", "x"), ("b", "y"), ("c", "y"))]
    rows[2]["own"] = "cat dog"
    made = data(rows, prompts={"x": ["question"], "y": ["answer"]}, prompt_column="own", separator=" \n ")
    found = [TOKENIZER.decode(tokens) for tokens, _ in epochs(made, (0,))[0]]
    assert found == ["question \n a <|im_end|>", "answer \n b <|im_end|>", "cat dog \n c <|im_end|>"]
    with pytest.raises(ValueError, match=r"'domain' is 'z', and prompts has the domains \['x', 'y'\]"):
        data([{"text": "a", "domain": "z"}], prompts={"x": ["question"], "y": ["answer"]})


def test_usable_with_map_alone_and_picklable():
    transform = pickle.loads(pickle.dumps(ContextualPromptTransform(tiny_tokenizer(), max_length=60)))
    rows = datasets.Dataset.from_list(DOCUMENTS)
    made, later = rows.map(transform), rows.map(transform, fn_kwargs={"epoch": 1})
    assert made["input_ids"] != later["input_ids"]
    assert made["input_ids"] == rows.map(transform)["input_ids"]
    assert max(map(len, made["input_ids"])) <= 60


def test_streams():
    made = data(datasets.Dataset.from_list(DOCUMENTS).to_iterable_dataset(), sampling="per_example", shuffle=False)
    plain = data(sampling="per_example", shuffle=False)
    for a, b in zip(made.train_dataloader(), plain.train_dataloader(), strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])


def test_ten_strategies_of_our_own():
    assert len(PROMPTS) == 10
    assert ContextualPromptTransform(TOKENIZER).prompts == list(PROMPTS.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["a " * 20], "max_length": 16}, r"a prompt of \d+ tokens fills max_length=16"),
        ({"prompts": []}, r"prompts=\[\] must be a list of texts"),
        ({"prompts": {"x": []}}, r"prompts=\[\] must be a list of texts"),
        ({"prompt_on": "last"}, "prompt_on='last' is not known"),
        ({"overlong": "cut"}, "overlong='cut' is not known: use one of 'chunk', 'truncate', 'drop', 'raise'"),
        ({"rows": [{"text": " "}]}, "a document is empty"),
        ({"rows": [{"messages": []}]}, r"columns \['messages'\]: a document is 'text'"),
        ({"validation": DOCUMENTS[3:5]}, "2 of 2 validation documents are also trained on"),
        ({"test": [{"text": "a"}, *DOCUMENTS[:1]]}, "1 of 2 test documents are also trained on"),
        ({"packing": True}, "set sampling='per_example'"),
    ],
)
def test_bad_inputs(arguments, message):
    with pytest.raises(ValueError, match=message):
        data(arguments.pop("rows", DOCUMENTS), **arguments)


def test_the_transform_alone_refuses_a_prompt_that_leaves_no_room():
    with pytest.raises(ValueError, match=r"a prompt of 3 tokens fills max_length=3"):
        ContextualPromptTransform(TOKENIZER, ["a b c"], max_length=3, separator="")({"text": "d"})
