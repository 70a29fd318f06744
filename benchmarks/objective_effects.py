"""What the papers on objectives say will happen, seen small: each technique beside plain fine-tuning, over seeds.

    .venv/bin/python benchmarks/objective_effects.py [--only NAME ...] [--seeds 0 1 2]

Networks are Llamas of two layers that first learn something to start from; both sides of a comparison then start there
and train through Lightning's Trainer on the same rows, for as many steps or to the same loss, as each function says. A
line is an effect: mean and standard deviation over seeds of the baseline and of the technique, and a verdict on the
differences seed by seed: "shown" if all have the sign that the paper says and their mean exceeds their standard
deviation, "reversed" if so with the other sign, else "not clear". Seconds are a function's, all its lines together.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.datamodules import (
    FaultPairs,
    ImageData,
    InstructionData,
    LookAheadDataLoader,
    LookAheadTransform,
    LookAheadTuningData,
    ShuffleDiscriminatedData,
    TraceSetCollator,
)
from lightning_peft.datamodules.collate import collate
from lightning_peft.datamodules.look_ahead_tuning import FirstTokensShift
from lightning_peft.datamodules.shuffle_discriminator import tuned_copy
from lightning_peft.datamodules.standard_library import standard_library_functions
from lightning_peft.datamodules.tokenized import tokenize_row
from lightning_peft.models import CausalLM, ImageClassifier
from lightning_peft.objectives import (
    DynamicFineTuningCausalLM,
    FaultAwareCausalLM,
    SelectiveMixupImageClassifier,
    SelfConstrainedCausalLM,
    SetSupervisedCausalLM,
)

IGNORED = -100


class Effect(NamedTuple):
    """A measure of both sides on one seed."""

    measure: str
    baseline: float
    technique: float
    better: str = "higher"


# -- what all of them need ---------------------------------------------------------------------------------------------


def llama(vocabulary: int, seed: int, hidden: int = 64, positions: int = 64) -> nn.Module:
    """A Llama of two layers from a seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=positions,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def tokenizer_of(words: list[str] | None = None) -> Any:
    """A fast tokenizer: `<pad>`, `<eos>` and the words between blanks, or without words the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<pad>", "<eos>", *(sorted(pre_tokenizers.ByteLevel.alphabet()) if words is None else words)]
    ids = {entry: i for i, entry in enumerate(entries)}
    if words is None:
        inner = Tokenizer(models.BPE(ids, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
    else:
        inner = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


class Until(L.Callback):
    """Ends the fit when a question is answered with yes; without that, the benchmark has no ground to stand on."""

    def __init__(self, reached: Callable[[], bool], every: int = 10) -> None:
        self.reached, self.every, self.done = reached, every, False

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and not self.done:
            module.eval()
            with torch.no_grad():
                self.done = trainer.should_stop = self.reached()
            module.train()


def fit(
    module: L.LightningModule, data: Any, steps: int, until: Callable[[], bool] | None = None, validates: bool = False
) -> int:
    """Trains for some steps, or until a question is answered with yes within them; gives the steps made."""
    stop = [] if until is None else [Until(until)]
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=int(validates),  # what SelMix is steered by
        callbacks=list(stop),
        default_root_dir=tempfile.gettempdir(),
    )
    trainer.fit(module, data)
    if stop and not stop[0].done:
        raise RuntimeError(f"{steps} steps were not enough: there is nothing to compare.")
    module.eval()
    return trainer.global_step


def loader(rows: list[dict[str, Any]], batch_size: int, seed: int) -> LookAheadDataLoader:
    return LookAheadDataLoader(rows, batch_size=batch_size, shuffle=True, seed=seed, collate_fn=batch_of)


def batch_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return collate(rows, pad_token_id=0)


def nll(network: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Loss of every label, those of one token after the other: [labels]."""
    with torch.no_grad():
        return CausalLM(network).row_losses(batch)[1]


# -- dynamic fine-tuning (paper 93) ------------------------------------------------------------------------------------

PLUS, EQUALS, BLANK, DIGITS, SLOTS = 2, 3, 4, 10, 6


def running_sums(n: int, length: int, draws: torch.Generator, wrong: float = 0.0) -> list[dict[str, Any]]:
    """Digits and their running sums modulo 10, worked out one after the other.

    Args:
        n: How many rows.
        length: Digits in a row, at most `SLOTS`.
        draws: Where the digits come from.
        wrong: How often a step is wrong; the next goes on from its result.
    """
    made = []
    for digits in torch.randint(10, (n, length), generator=draws).tolist():
        slips = (torch.rand(length, generator=draws) < wrong) * torch.randint(1, 10, (length,), generator=draws)
        sums = [total % 10 for total in itertools.accumulate(d + s for d, s in zip(digits, slips.tolist()))]
        asked = [PLUS, *(DIGITS + d for d in digits), *[BLANK] * (SLOTS - length), EQUALS]
        answer = [DIGITS + s for s in sums]
        made.append({"input_ids": asked + answer, "labels": [IGNORED] * len(asked) + answer})
    return made


def accuracy(network: nn.Module, rows: list[dict[str, Any]]) -> float:
    """How many rows' whole answers greedy decoding gives."""
    whole = torch.tensor([row["input_ids"] for row in rows])
    made = whole[:, : SLOTS + 2]
    with torch.no_grad():
        while made.shape[1] < whole.shape[1]:
            made = torch.cat([made, network(made).logits[:, -1:].argmax(-1)], 1)
    return (made == whole).all(1).float().mean().item()


def dynamic_fine_tuning(seed: int) -> list[Effect]:
    """A network that solves half of its sums learns from 256 worked answers of 4 digits, 5 epochs at equal rates.

    In distribution are new sums of 4 digits, out of it those of 6, which only the first training had. Where answers are
    right, each is the only one and the network lacks it: the case for which the paper itself names cross-entropy.
    """
    draws = torch.Generator().manual_seed(seed)
    first = [row for n in (2, 3, 4, 5, 6) for row in running_sums(4096, n, draws)]
    inside, outside = running_sums(512, 4, draws), running_sums(512, 6, draws)
    start = llama(20, seed)
    base = CausalLM(start, learning_rate=5e-3, lr_scheduler="constant")
    fit(base, loader(first, 64, seed), 3000, lambda: accuracy(start, inside[:256]) > 0.5)
    made = []
    for told, wrong in (("right", 0.0), ("a fifth of steps wrong", 0.2)):
        shown = running_sums(256, 4, draws, wrong)
        found = []
        for kind in (CausalLM, DynamicFineTuningCausalLM):
            network = copy.deepcopy(start)
            module = kind(network, learning_rate=1e-3, lr_scheduler="constant")
            fit(module, loader(shown, 16, seed), 80)
            found.append((accuracy(network, inside), accuracy(network, outside)))
        (sft_in, sft_out), (dft_in, dft_out) = found
        made.append(Effect(f"accuracy on 4 digits, answers {told}", sft_in, dft_in))
        made.append(Effect(f"accuracy on 6 digits, answers {told}", sft_out, dft_out))
    return made


# -- fault-aware fine-tuning (paper 94) --------------------------------------------------------------------------------


def margins(network: nn.Module, batches: Iterable[dict[str, Any]]) -> Tensor:
    """How much likelier the correct segment of each pair is than the wrong one, nats a token: [pairs]."""
    found = []
    for batch in batches:
        sides = []
        for prefix in ("wrong_", ""):
            ids, fault = batch[prefix + "input_ids"], batch[prefix + "fault_mask"].bool()
            with torch.no_grad():
                logits = network(ids, attention_mask=batch[prefix + "attention_mask"]).logits[:, :-1]
            each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * fault[:, 1:]
            sides.append(each.sum(1) / fault[:, 1:].sum(1))
        found.append(sides[0] - sides[1])
    return torch.cat(found)


def differing_span(one: list[int], other: list[int]) -> tuple[int, int]:
    """Where `one` differs from `other`: from the end of what both begin with to the start of what both end with."""
    begin = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    room = min(len(one), len(other)) - begin
    end = next((i for i, (a, b) in enumerate(zip(one[::-1], other[::-1])) if a != b or i >= room), room)
    return begin, len(one) - end


def unpadded(batch: dict[str, Any], side: str, row: int) -> list[int]:
    return batch[f"{side}input_ids"][row][batch[f"{side}attention_mask"][row] != 0].tolist()


def weight_in_span(module: CausalLM, batches: Iterable[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Weights of all learnt tokens, and which of them stand where the two programs differ: [tokens] each."""
    weights, inside = [], []
    for batch in batches:
        with torch.no_grad():
            terms = module.terms(batch, {name: torch.tensor(float(n)) for name, n in module.counts(batch).items()})
        places = torch.zeros_like(batch["labels"], dtype=torch.bool)
        for row, own in enumerate(places):
            begin, end = differing_span(*(unpadded(batch, side, row) for side in ("", "wrong_")))
            own[begin : max(end, begin + 1)] = True
        assert terms.weights is not None
        weights.append(terms.weights)
        inside.append(places.flatten()[terms.units.index])
    return torch.cat(weights), torch.cat(inside)


def fault_aware(seed: int) -> list[Effect]:
    """96 short functions of the standard library as bytes, each with a mutation; 8 epochs, alpha 0, 1 (default) and 8.

    They start from a network that has read a thousand others; weights are those at the start. Where programs differ is
    told without the technique's own alignment: between what the two begin with and what they end with.
    """
    tokenizer = tokenizer_of()
    short = [row for row in standard_library_functions() if len(row["prompt"]) + len(row["completion"]) < 260]
    random.Random(seed).shuffle(short)
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in short]
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_length": 264, "batch_size": 8, "seed": seed}
    start = llama(len(tokenizer), seed, positions=512)
    base = CausalLM(start, learning_rate=3e-3, lr_scheduler="constant")
    fit(base, InstructionData(rows[192:], completion_only_loss=False, **options), 150)
    batches, held = (list(FaultPairs(part, **options).train_dataloader()) for part in (rows[:96], rows[96:192]))
    weights, inside = weight_in_span(FaultAwareCausalLM(start), batches)
    excess, told = weights - 1, {}
    for alpha in (0.0, 1.0, 8.0):
        network = copy.deepcopy(start)
        module = FaultAwareCausalLM(network, fait_alpha=alpha, learning_rate=1e-3, lr_scheduler="constant")
        fit(module, FaultPairs(rows[:96], **options), 8 * len(batches))
        after = margins(network, batches)
        told[alpha] = {
            "growth of the margin on training pairs, nats": (after - margins(start, batches)).mean().item(),
            "training pairs of which the correct one is likelier": (after > 0).float().mean().item(),
            "growth of the margin on new pairs, nats": (margins(network, held) - margins(start, held)).mean().item(),
        }
    share = (excess[inside].sum() / excess.sum()).item()
    return [
        Effect("share of tokens, and of weight above 1, where programs differ", inside.float().mean().item(), share),
        Effect(
            "mean weight where they agree and differ", weights[~inside].mean().item(), weights[inside].mean().item()
        ),
        *(Effect(f"{what}, alpha {a:g}", told[0.0][what], told[a][what]) for a in (1.0, 8.0) for what in told[0.0]),
    ]


# -- shuffle-aware discrimination (paper 104) --------------------------------------------------------------------------

ASKED, TOLD, NOISE = range(20, 36), range(40, 56), (60, 128)


def shuffle_discrimination(seed: int) -> list[Effect]:
    """A network that knows two functions of a question, and answers in a frame that it does not: header, both, footer.

    Balanced accuracy of the mask on all answers. The baseline is the same pass with a copy that was tuned on rows left
    as they are, so that what is seen is the shuffle's own doing; a constant mask has 0.5.
    """
    draws = random.Random(seed)
    functions = [draws.sample(TOLD, 16) for _ in range(2)]
    header, footer = draws.sample(range(*NOISE), 3), draws.sample(range(*NOISE), 2)

    def answer(question: int) -> list[int]:
        return [function[question - ASKED[0]] for function in functions]

    def known() -> dict[str, Any]:
        question, noise = draws.choice(ASKED), draws.choices(range(*NOISE), k=5)
        ids = [question, *noise[:3], *answer(question), *noise[3:]]
        return {"input_ids": ids, "labels": [IGNORED] * 4 + ids[4:6] + [IGNORED] * 2}

    start = llama(128, seed)
    held = batch_of([known() for _ in range(256)])
    base = CausalLM(start, learning_rate=3e-3, lr_scheduler="constant")
    fit(base, loader([known() for _ in range(8192)], 32, seed), 1500, lambda: nll(start, held).mean().item() < 0.5)

    framed = []
    for question in [*ASKED] * 4:
        ids = [question, *header, *answer(question), *footer]
        framed.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    truth = torch.tensor([0, 0, 0, 1, 1, 0, 0]).bool().expand(len(framed), -1)
    options = {"epochs": 8, "learning_rate": 3e-3, "batch_size": 8, "lora_rank": 0, "seed": seed}
    batch = batch_of(framed)
    plain = tuned_copy(start, [(row["input_ids"], row["labels"]) for row in framed[:32]], **options)
    rise = nll(plain, batch) - nll(start, batch)
    with tempfile.TemporaryDirectory() as cache:
        data = ShuffleDiscriminatedData(
            framed,
            tokenizer=tokenizer_of([f"w{i}" for i in range(126)]),
            batch_size=64,
            shuffle=False,
            seed=seed,
            cache_dir=cache,
            shuffled_rows=32,
            **{f"shuffled_{name}": value for name, value in options.items() if name != "seed"},
        )
        fit(CausalLM(start, learning_rate=0.0), data, 1)
        (made,) = data.train_dataloader()
    masks = rise.view(truth.shape) > 0, made["reasoning_mask"][:, 1:].bool()
    return [Effect("balanced accuracy of the mask", *(balanced(mask, truth) for mask in masks))]


def balanced(mask: Tensor, truth: Tensor) -> float:
    """Mean of the recalls of both sides."""
    return (mask[truth].float().mean() + (~mask)[~truth].float().mean()).item() / 2


# -- set supervised fine-tuning (paper 33) -----------------------------------------------------------------------------


def set_supervised(seed: int) -> list[Effect]:
    """Questions with three ways to answer each, in random order; 3 tags, matched by cost or at random, 96 steps.

    A way is a first token with a rule for the next two. Measured on new questions: p(way | tag) of the ways, the best
    assignment of ways to tags; 1/3 is a tag that says nothing.
    """
    tags, ways, draws = [10, 11, 12], [20, 21, 22], random.Random(seed)
    tokenizer = tokenizer_of([f"w{i}" for i in range(2, 64)])
    names = tokenizer.convert_ids_to_tokens(tags)

    def question(number: int) -> dict[str, Any]:
        asked = draws.choices(range(30, 40), k=2)
        traces = [[way, *(a + 10 * (way - ways[0]) for a in asked)] for way in ways]
        draws.shuffle(traces)
        prompt = [2, *asked, tags[0]]
        return {
            "question_id": number,
            "traces": [{"input_ids": prompt + one, "labels": [IGNORED] * len(prompt) + one} for one in traces],
        }

    questions, new = [question(i) for i in range(128)], [question(i) for i in range(64)]
    asked = torch.tensor([one["traces"][0]["input_ids"][:3] for one in new])
    found = []
    for matching in ("random", "optimal"):
        network = llama(64, seed)
        module = SetSupervisedCausalLM(
            network,
            tokenizer=tokenizer,
            ssft_tags=names,
            ssft_matching=matching,
            learning_rate=3e-3,
            lr_scheduler="constant",
        )
        rows = LookAheadDataLoader(questions, batch_size=8, shuffle=True, seed=seed, collate_fn=TraceSetCollator())
        fit(module, rows, 96)
        p = []
        for tag in tags:
            with torch.no_grad():
                logits = network(F.pad(asked, (0, 1), value=tag)).logits[:, -1, ways]
            p.append(logits.softmax(-1).mean(0))
        table = torch.stack(p)
        found.append(max(table[range(3), way].mean().item() for way in itertools.permutations(range(3))))
    return [Effect("p(way | tag), matched against random tags", *found)]


# -- selective mixup (paper 110) ---------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """A layer of features under a linear head."""

    class config:
        num_labels = 10

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.hidden, self.classifier = nn.Linear(64, 48), nn.Linear(48, 10)

    def forward(self, pixel_values: Tensor) -> Any:
        class Outputs:
            logits = self.classifier(torch.tanh(self.hidden(pixel_values.flatten(1))))

        return Outputs


def selective_mixup(seed: int) -> list[Effect]:
    """Digits, the last class 30 times rarer than the first; from one plain network 400 more steps, plain or SelMix.

    A quarter of the rows steers SelMix; recalls are those on another quarter. Neither is long-tailed.
    """

    def data(**kwargs: Any) -> ImageData:
        options: dict[str, Any] = {"validation": 0.25, "test": 0.25, "imbalance": 30.0, "image_size": 8, "channels": 1}
        return ImageData("digits", batch_size=32, eval_batch_size=512, seed=seed, **options, **kwargs)

    start, test = Pixels(seed), data()
    test.setup("test")
    batches = list(test.test_dataloader())
    labels = torch.cat([batch["labels"] for batch in batches])
    sgd: dict[str, Any] = {"optimizer": "sgd", "optimizer_args": {"momentum": 0.9}, "lr_scheduler": "constant"}
    fit(ImageClassifier(start, learning_rate=0.05, **sgd), data(), 100)
    recalls = {}
    for metric in (None, "mean_recall", "min_recall"):
        network = copy.deepcopy(start)
        module: Any = ImageClassifier(network, learning_rate=5e-3, **sgd)
        if metric is not None:
            # Refreshed often: a class that is chosen for long overshoots, and another falls behind.
            rates = {"learning_rate": 5e-4, "head_learning_rate": 5e-3, "selmix_every": 10, "selmix_stop": None}
            module = SelectiveMixupImageClassifier(network, selmix_metric=metric, **rates, **sgd)
        fit(module, data(class_pairs=metric is not None), 400, validates=metric is not None)
        with torch.no_grad():
            right = torch.cat([network(batch["pixel_values"]).logits.argmax(-1) for batch in batches]) == labels
        recalls[metric] = torch.stack([right[labels == c].float().mean() for c in range(10)])
    made = []
    for metric in ("mean_recall", "min_recall"):
        for name, value in (("mean", Tensor.mean), ("least", Tensor.min)):
            sides = (float(value(recalls[side])) for side in (None, metric))
            made.append(Effect(f"{name} recall, steered by {metric}", *sides))
    return made


# -- self-constrained fine-tuning (paper 52) ---------------------------------------------------------------------------


def self_constrained(seed: int) -> list[Effect]:
    """A network that has learnt a language (a Markov chain) learns 16 facts, told in texts of another.

    Plain fine-tuning goes on until the facts' loss has fallen to 0.5 on new texts; the other side, lambda 0.1, until it
    predicts new texts as well as that. Then both read texts of the first language that neither has seen.
    """
    words, keys, values = range(4, 24), range(24, 40), range(40, 56)
    draws, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    languages = (1.5 * torch.randn(2, 20, 20, generator=generator)).softmax(-1).tolist()
    facts = dict(zip(keys, draws.sample(values, 16)))

    def text(language: int, length: int) -> list[int]:
        made = [draws.choice(words)]
        while len(made) < length:
            made += draws.choices(words, languages[language][made[-1] - words[0]])
        return made

    def row(ids: list[int]) -> dict[str, Any]:
        return {"input_ids": ids, "labels": ids}

    def telling() -> dict[str, Any]:
        key = draws.choice(keys)
        return row([*text(1, 5), key, facts[key], *text(1, 5)])

    start = llama(64, seed)
    base = CausalLM(start, learning_rate=3e-3, lr_scheduler="constant")
    fit(base, loader([row(text(0, 16)) for _ in range(4096)], 64, seed), 400)
    old, new = batch_of([row(text(0, 16)) for _ in range(512)]), batch_of([telling() for _ in range(256)])
    told = {**new, "labels": torch.where(new["input_ids"] >= values[0], new["input_ids"], IGNORED)}
    rows, network = [telling() for _ in range(8192)], copy.deepcopy(start)
    before, options = nll(start, old).mean(), {"learning_rate": 1e-3, "lr_scheduler": "constant"}
    fit(CausalLM(network, **options), loader(rows, 16, seed), 1500, lambda: nll(network, told).mean() < 0.5)
    held = copy.deepcopy(start)
    module, goal = SelfConstrainedCausalLM(held, nsc_weight=0.1, **options), nll(network, new).mean()
    fit(module, loader(rows, 16, seed), 1500, lambda: nll(held, new).mean() <= goal)
    rises = [(nll(one, old).mean() - before).item() for one in (network, held)]
    return [Effect("rise of the old language's loss, nats a token, at equal loss of the new", *rises, "lower")]


# -- look-ahead tuning (paper 102) -------------------------------------------------------------------------------------

PREVIEW = 3


def look_ahead(seed: int) -> list[Effect]:
    """A network that opens its answers in many ways and ends them with two words that it makes of the question's two.

    It goes on as it is told to begin, if it is. Tuned, half of the words change, and all answers shown open alike. Both
    sides train until new questions' last words, asked without a preview, are learnt (loss 0.5).
    """
    asked, openings, ends = ([f"{kind}{i}" for i in range(20)] for kind in ("ask", "open", "end"))
    tokenizer = tokenizer_of([*asked, *openings, *ends, "->", "answer"])
    options: dict[str, Any] = {"preview_tokens": PREVIEW, "connector": " answer "}
    look, draws = LookAheadTransform(tokenizer, **options), random.Random(seed)
    known = dict(zip(asked, draws.sample(ends, 20)))
    changed = {**known, **dict(zip(asked[:10], (known[word] for word in [*asked[1:10], asked[0]])))}
    phrase = draws.sample(openings, PREVIEW)

    def row(answers: dict[str, str], opening: list[str] | None = None) -> dict[str, str]:
        question = draws.choices(asked, k=2)
        answer = [*(opening or draws.choices(openings, k=PREVIEW)), *(answers[word] for word in question)]
        return {"prompt": " ".join(question) + " -> ", "completion": " ".join(answer)}

    def tokens(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        made = [tokenize_row(one, tokenizer) for one in rows]
        return [{name: one[name] for name in ("input_ids", "labels")} for one in made]

    def ending(rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Only the words behind the opening are learnt."""
        batch = batch_of(tokens(rows))
        learnt = (batch["labels"] != IGNORED).cumsum(1)
        return {**batch, "labels": torch.where(learnt > PREVIEW, batch["labels"], IGNORED)}

    start = llama(len(tokenizer), seed)
    first = [row(known) for _ in range(8192)]
    first = tokens([look(one) if i % 2 else one for i, one in enumerate(first)])
    own = batch_of(tokens([look(row(known)) for _ in range(128)]))
    base = CausalLM(start, learning_rate=3e-3, lr_scheduler="constant")
    fit(base, loader(first, 32, seed), 3000, lambda: nll(start, own).mean().item() < 0.1)
    task, new = [row(changed, phrase) for _ in range(256)], [row(changed, phrase) for _ in range(128)]
    goal, asked_new, shifts = ending(new), batch_of(tokens(new)), []
    for kind, more in ((InstructionData, {}), (LookAheadTuningData, options)):
        network = copy.deepcopy(start)
        data = kind(task, tokenizer=tokenizer, batch_size=16, seed=seed, **more)
        module = CausalLM(network, learning_rate=1e-3, lr_scheduler="constant")
        fit(module, data, 2000, lambda network=network: nll(network, goal).mean().item() < 0.5)
        shift = FirstTokensShift(PREVIEW)
        inputs = {name: asked_new[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            shift.update(network(**inputs).logits, start(**inputs).logits, asked_new["labels"])
        shifts.append(float(shift.compute()))
    return [
        Effect(f"KL of the first {PREVIEW} tokens from the start's, nats, at equal loss of the rest", *shifts, "lower")
    ]


EFFECTS: dict[str, Callable[[int], list[Effect]]] = {
    "dynamic_fine_tuning": dynamic_fine_tuning,
    "fault_aware": fault_aware,
    "shuffle_discrimination": shuffle_discrimination,
    "set_supervised": set_supervised,
    "selective_mixup": selective_mixup,
    "self_constrained": self_constrained,
    "look_ahead": look_ahead,
}


def verdict(gains: list[float]) -> str:
    """What the differences of the seeds say, each positive where the technique is the better."""
    if len(gains) < 2:
        return "one seed"
    for said, sign in (("shown", 1), ("reversed", -1)):
        if all(sign * gain > 0 for gain in gains) and sign * statistics.mean(gains) > statistics.stdev(gains):
            return said
    return "not clear"


def told(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):9.3f} ±{spread:6.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(EFFECTS), default=list(EFFECTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()
    print(f"{'effect':72} {'baseline':>17} {'technique':>17}  {'verdict':10} {'s a seed':>8}")
    for name in arguments.only:
        began = time.perf_counter()
        made = [EFFECTS[name](seed) for seed in arguments.seeds]
        spent = (time.perf_counter() - began) / len(made)
        print(f"{name}{spent:{110 + 18 - len(name)}.1f}")
        for found in zip(*made):
            baseline, technique = [one.baseline for one in found], [one.technique for one in found]
            sign = 1 if found[0].better == "higher" else -1
            said = verdict([sign * (b - a) for a, b in zip(baseline, technique)])
            print(f"  {found[0].measure:70} {told(baseline):>17} {told(technique):>17}  {said}", flush=True)


if __name__ == "__main__":
    main()
