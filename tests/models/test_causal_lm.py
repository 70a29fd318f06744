"""The step against transformers' own loss, one large batch, and hand formulas."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch.nn import functional as F

from lightning_peft.datamodules.look_ahead import LookAheadDataLoader
from lightning_peft.models import CausalLM
from lightning_peft.objectives import Objective
from tests.tiny import tiny_gpt2, tiny_llama

VOCABULARY = 128


def rows(n: int, time: int = 12, seed: int = 0, lengths: list[int] | None = None) -> list[dict]:
    """Rows whose number of labelled tokens differs a lot: a mean of means would show."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        ids = torch.randint(1, VOCABULARY, (time,), generator=generator)
        labels = ids.clone()
        labels[: (i * 5) % (time - 1)] = -100
        made.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones(time, dtype=torch.long)})
    return made


def batch_of(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([e[key] for e in examples]) for key in examples[0]}


def quiet_trainer(path, **kwargs) -> L.Trainer:
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(default_root_dir=path, enable_model_summary=False, **{**options, **kwargs})


def counts_of(module: CausalLM, batch: dict) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(float(n)) for name, n in module.counts(batch).items()}


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("freeze_head", [True, False])
def test_loss_and_gradients_are_those_of_transformers(build, tied, freeze_head):
    network = build(tie_word_embeddings=tied)
    network.get_output_embeddings().requires_grad_(not freeze_head)
    module, batch = CausalLM(network), batch_of(rows(4))
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    ours = gradients(network)
    network.zero_grad()
    expected = network(**batch).loss
    expected.backward()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-5, atol=1e-6)
    assert ours.keys() == gradients(network).keys()
    for name, grad in gradients(network).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


def test_softcap_and_scale_are_read_from_the_config():
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, head_dim=8, final_logit_softcapping=0.5))
    cohere = CohereForCausalLM(CohereConfig(**sizes, **heads, logit_scale=0.3))
    for network in (gemma, cohere):
        module, batch = CausalLM(network.train()), batch_of(rows(3))
        terms = module.terms(batch, counts_of(module, batch))
        torch.testing.assert_close(terms.loss, network(**batch).loss, rtol=1e-4, atol=1e-5)


def test_a_transform_that_no_config_names_is_refused():
    network = tiny_llama()
    forward = network.forward

    def scaled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 3
        return outputs

    network.forward = scaled
    module, batch = CausalLM(network), batch_of(rows(2))
    with pytest.raises(ValueError, match="logit_transform"):
        module.terms(batch, counts_of(module, batch))


class Weighted(Objective):
    """DFT's weight, by hand."""

    def __init__(self, rowwise: bool = True) -> None:
        self.rowwise = rowwise
        self.seen: list[torch.Tensor] = []

    def loss_weights(self, module, batch, units):
        self.seen.append(units.index)
        assert not units.nll.requires_grad
        assert torch.equal(batch["labels"].flatten()[units.index], units.labels)
        return torch.exp(-units.nll)


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("freeze_head", [True, False])
def test_weights_multiply_and_are_detached(rowwise, freeze_head):
    network = tiny_llama()
    network.get_output_embeddings().requires_grad_(not freeze_head)
    batch = batch_of(rows(4))
    batch["weight"] = torch.tensor([0.0, 1.0, 2.0, 0.5])
    module = CausalLM(network, objectives=[Weighted(rowwise), Weighted(rowwise)])
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    ours = gradients(network)
    network.zero_grad()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = network(**inputs).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    weights = torch.exp(-2 * nll.detach()) * batch["weight"][:, None]
    expected = (weights * nll).sum() / (labels != -100).sum()
    expected.backward()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-5, atol=1e-7)
    for name, grad in gradients(network).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-7)


class Extra(Objective):
    """An auxiliary term with a count of its own: the mean of squared final hidden states at odd labels."""

    def counts(self, module, batch):
        return {"extra": int((batch["labels"] % 2 == 1).sum())}

    def auxiliary_losses(self, module, batch, outputs):
        hidden = module.hidden_states(batch)
        return {"extra": (hidden.pow(2).mean(-1) * (batch["labels"] % 2 == 1)).sum()}


def train(tmp_path, micro_batch: int, accumulate: int, loader=LookAheadDataLoader, **kwargs) -> dict:
    torch.manual_seed(0)
    module = CausalLM(
        tiny_llama(), objectives=[Extra()], optimizer="sgd", learning_rate=0.1, lr_scheduler="constant", **kwargs
    )
    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(rows(24), batch_size=micro_batch, shuffle=False, collate_fn=batch_of))
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_accumulation_is_the_large_batch(tmp_path):
    large = train(tmp_path, 8, 1)
    for micro_batch, accumulate in ((2, 4), (4, 2)):
        small = train(tmp_path, micro_batch, accumulate)
        for name, value in large.items():
            torch.testing.assert_close(small[name], value, rtol=0, atol=1e-6)


def test_last_window_of_an_epoch_may_be_shorter(tmp_path):
    # 24 rows: windows of 3 x 5 rows and one of the 9 that are left (5 + 4), so the large batches are 15 and 9.
    windows = train(tmp_path, 5, 3)
    torch.manual_seed(0)
    module = CausalLM(tiny_llama(), objectives=[Extra()], optimizer="sgd")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for part in (rows(24)[:15], rows(24)[15:]):
        batch = batch_of(part)
        optimizer.zero_grad()
        module.terms(batch, counts_of(module, batch)).loss.backward()
        optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(windows[name], p.detach(), rtol=0, atol=1e-6)


def test_a_foreign_loader_falls_back_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="LookAheadDataLoader"):
        train(tmp_path, 4, 2, loader=torch.utils.data.DataLoader)


def test_validation_is_exact_over_batches(tmp_path):
    module = CausalLM(tiny_llama())
    loader = torch.utils.data.DataLoader(rows(10), batch_size=3, collate_fn=batch_of)
    (result,) = quiet_trainer(tmp_path).validate(module, loader, verbose=False)
    batch = batch_of(rows(10))
    module.eval()
    with torch.no_grad():
        outputs = module.model(**batch)
    labels = batch["labels"][:, 1:]
    right = (outputs.logits[:, :-1].argmax(-1) == labels)[labels != -100]
    assert result["val_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert result["val_perplexity"] == pytest.approx(outputs.loss.exp().item(), rel=1e-4)
    assert result["val_accuracy"] == pytest.approx(right.float().mean().item(), abs=1e-6)


def test_all_labels_ignored_in_a_micro_batch_is_zero_not_nan():
    module, batch = CausalLM(tiny_llama()), batch_of(rows(2))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert all(g.abs().sum() == 0 for g in gradients(module.model).values())


def test_a_head_with_lora_goes_through_its_module():
    from peft import LoraConfig, get_peft_model

    network = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    module, batch = CausalLM(network), batch_of(rows(4))
    terms = module.terms(batch, counts_of(module, batch))
    terms.loss.backward()
    ours = gradients(network)
    network.zero_grad()
    expected = network(**batch).loss
    expected.backward()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-5, atol=1e-6)
    assert any("lm_head.lora_B" in name for name in ours)
    for name, grad in gradients(network).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


def test_prompt_learning_is_not_ignored():
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    for config in (
        PromptTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM),
        PrefixTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM),
    ):
        network = get_peft_model(tiny_llama(), config)
        module, batch = CausalLM(network), batch_of(rows(3))
        batch["labels"][:, 0] = -100  # PEFT would let the last virtual token predict a row's first token
        terms = module.terms(batch, counts_of(module, batch))
        expected = network(**batch).loss
        torch.testing.assert_close(terms.loss, expected, rtol=1e-4, atol=1e-5)
        terms.loss.backward()
        assert gradients(network)


def test_packed_documents_equal_those_run_apart():
    module = CausalLM(tiny_llama())
    first, second = rows(1, 7, seed=1)[0], rows(1, 5, seed=2)[0]
    apart = 0.0
    for example in (first, second):
        batch = batch_of([example])
        apart = apart + module.terms(batch, {"loss": torch.tensor(1.0)}).loss
    packed = {"input_ids": torch.cat([first["input_ids"], second["input_ids"], torch.zeros(3, dtype=torch.long)])[None]}
    labels = torch.cat([first["labels"], second["labels"], torch.full((3,), -100)])
    labels[7] = -100  # the first token of a document is nobody's next token
    packed["labels"] = labels[None]
    packed["document_ids"] = torch.tensor([[0] * 7 + [1] * 5 + [-1] * 3])
    packed["position_ids"] = torch.tensor([[*range(7), *range(5), *range(3)]])
    together = module.terms(packed, {"loss": torch.tensor(1.0)}).loss
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_checkpoint_loads_by_lightning_alone(tmp_path):
    folder = tmp_path / "network"
    tiny_llama().save_pretrained(folder)
    module = CausalLM(str(folder), learning_rate=1e-3)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(module, LookAheadDataLoader(rows(4), batch_size=2, collate_fn=batch_of))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.learning_rate == 1e-3
    for (name, a), (_, b) in zip(module.named_parameters(), loaded.named_parameters()):
        assert torch.equal(a, b), name


def test_bad_arguments_name_themselves(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer='torch\.optim\.Nothing'"):
        CausalLM(tiny_llama(), optimizer="torch.optim.Nothing")
    with pytest.raises(ValueError, match="warmup_steps"):
        CausalLM(tiny_llama(), warmup_steps=-1)
    with pytest.raises(FileNotFoundError, match="no such file"):
        CausalLM(str(tmp_path / "nothing.gguf"))
    module = CausalLM(tiny_llama().requires_grad_(False))
    with pytest.raises(ValueError, match="nothing would train"):
        quiet_trainer(tmp_path, max_steps=1).fit(module, LookAheadDataLoader(rows(2), collate_fn=batch_of))


def test_validate_and_then_fit_with_validation(tmp_path):
    """`Trainer.validate` leaves metrics made in inference mode behind, which the validation in `fit` adds to."""
    module, data = CausalLM(tiny_llama(), lr_scheduler="constant"), LookAheadDataLoader(rows(6), batch_size=3)
    trainer = quiet_trainer(tmp_path, max_steps=2)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data, data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert after["val_loss"] != before["val_loss"]
