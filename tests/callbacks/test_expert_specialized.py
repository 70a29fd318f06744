"""ESFT: the chosen experts train, with their size in memory, and nothing else; scores from files, probes, resumes."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.attribution.expert_routing import METHOD, relevant_experts, routing_scores
from lightning_peft.callbacks import ExpertSpecialized
from lightning_peft.cli import main
from lightning_peft.scores import load_scores, save_scores
from tests.attribution.test_expert_routing import SEQUENCES
from tests.callbacks.test_half_finetuning import causal, copied, fit, trained
from tests.conformance.data import Rows
from tests.tiny import tiny_llama, tiny_mixtral, tiny_tokenizer

EXPERTS = ("gate_up_proj", "down_proj")


def scores_file(folder, network) -> str:
    return str(save_scores(folder / "s.safetensors", routing_scores(network, SEQUENCES), network, METHOD))


@pytest.mark.parametrize("score", ["token", "gate"])
def test_the_chosen_experts_move_and_nothing_else(score, tmp_path):
    module = causal(tiny_mixtral(), weight_decay=0.1)
    scores = routing_scores(module.model, SEQUENCES)
    before = copied(module)
    callback = ExpertSpecialized(score, 0.5, scores_file(tmp_path, module.model))
    trainer = fit(module, callback, max_steps=3)
    after = module.state_dict()
    held = 0
    for layer, one in enumerate(scores.values()):
        chosen = relevant_experts(one[("token", "gate").index(score)], 0.5).tolist()
        assert 0 < len(chosen) < 4
        for name in EXPERTS:
            full = f"model.model.layers.{layer}.mlp.experts.{name}"
            moved = (before[full] != after[full]).flatten(1).any(1).nonzero().flatten().tolist()
            assert set(moved) <= set(chosen)
            assert moved
            held += len(chosen) * before[full][0].numel()
    assert all(".mlp.experts." in name for name in trained(module, before))
    # Gradient and optimizer state of the chosen experts' size.
    states = trainer.optimizers[0].state.values()
    assert sum(state["exp_avg"].numel() for state in states) == held


def test_a_step_is_that_of_full_fine_tuning_on_these_experts(tmp_path):
    made = []
    callback = ExpertSpecialized("token", 0.6, scores_file(tmp_path, tiny_mixtral()))
    for callbacks in ([callback], []):
        module = causal(tiny_mixtral(), optimizer="sgd")
        fit(module, None, callbacks=callbacks, max_steps=1)
        made.append(module.state_dict())
    for experts, chosen in callback._experts.items():
        for name in EXPERTS:
            full = f"{experts}.{name}"
            torch.testing.assert_close(made[0][full][chosen], made[1][full][chosen], rtol=0, atol=1e-6)


def test_everything_else_too_if_asked(tmp_path):
    module = causal(tiny_mixtral())
    before = copied(module)
    fit(module, ExpertSpecialized(scores=scores_file(tmp_path, module.model), train_non_expert_modules=True))
    moved = trained(module, before)
    assert {name for name in before if "self_attn" in name or "embed" in name or "lm_head" in name} <= moved


def test_shared_experts_if_asked():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16}
    config = Qwen2MoeConfig(
        vocab_size=128, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes, **experts
    )
    for shared in (False, True):
        module = causal(Qwen2MoeForCausalLM(config))
        before = copied(module)
        fit(module, ExpertSpecialized(probe=SEQUENCES, top_p=0.5, train_shared_experts=shared))
        moved = trained(module, before)
        assert any("shared_expert." in name for name in moved) == shared
        assert any(".experts." in name for name in moved)
        assert not any("self_attn" in name or name.endswith("mlp.gate.weight") for name in moved)


def test_scores_from_a_probe_are_kept_where_the_file_is_to_be(tmp_path):
    path, texts = tmp_path / "made.safetensors", ["a b c", "question one two"]
    module = causal(tiny_mixtral(), tokenizer=tiny_tokenizer())
    fit(module, ExpertSpecialized(scores=str(path), probe=texts))
    expected = routing_scores(tiny_mixtral(), [tiny_tokenizer()(text)["input_ids"] for text in texts])
    kept, _ = load_scores(path, tiny_mixtral(), METHOD)
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value)


def test_a_resumed_run_has_its_experts_from_the_checkpoint(tmp_path):
    path = scores_file(tmp_path, tiny_mixtral())
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole, resumed = causal(tiny_mixtral()), causal(tiny_mixtral())
    fit(whole, None, callbacks=[ExpertSpecialized(scores=path), saving], max_steps=4, enable_checkpointing=True)
    (tmp_path / "s.safetensors").unlink()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    callbacks = [ExpertSpecialized(scores=path)]
    trainer = L.Trainer(accelerator="cpu", max_steps=4, callbacks=callbacks, enable_checkpointing=False, **quiet)
    trainer.fit(resumed, Rows("tokens", batch_size=12), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_picture(tmp_path):
    callback = ExpertSpecialized(probe=SEQUENCES, picture=True)
    fit(causal(tiny_mixtral()), callback, default_root_dir=tmp_path)
    assert (tmp_path / "expertspecialized.png").stat().st_size > 1000


def test_the_command_line_makes_the_file(tmp_path, capsys):
    folder, rows, output = tmp_path / "net", tmp_path / "rows.jsonl", tmp_path / "scores.safetensors"
    tiny_mixtral().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows.write_text('{"text": "a b c"}\n{"text": "d e"}')
    arguments = ["--model", str(folder), "--data", str(rows), "--output", str(output), "--column", "text"]
    main(["select", "--method", METHOD, *arguments])
    assert "scores of 2 routers from 2 questions" in capsys.readouterr().out
    made, _ = load_scores(output, tiny_mixtral(), METHOD)
    for name, value in routing_scores(
        tiny_mixtral(), [tiny_tokenizer()(t)["input_ids"] for t in ("a b c", "d e")]
    ).items():
        torch.testing.assert_close(made[name], value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "loss"}, "score='loss'"),
        ({"top_p": 0}, "top_p=0 must lie in"),
        ({"top_p": 1.5}, "top_p=1.5 must lie in"),
        ({"scores": None}, "needs scores="),
    ],
)
def test_bad_arguments_name_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExpertSpecialized(**{"scores": "s", **arguments})


def test_a_dense_network_is_refused():
    with pytest.raises(ValueError, match=r"dense|experts"):
        fit(causal(tiny_llama()), ExpertSpecialized(probe=SEQUENCES))
