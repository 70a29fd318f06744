"""LoKI: the rows of lowest attribution train and nothing else; scores from files, from questions, from checkpoints."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.attribution.knowledge_vectors import METHOD, down_weights, lowest_nodes, question_scores
from lightning_peft.callbacks import LoKI
from lightning_peft.cli import main
from lightning_peft.roles import weights_by_role
from lightning_peft.scores import load_scores, save_scores
from tests.attribution.test_knowledge_vectors import QUESTIONS
from tests.callbacks.test_half_finetuning import causal, copied, fit
from tests.conformance.data import Rows
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_tokenizer

TEXTS = ["a b c", "question one two three", "cat dog"]


def scores_file(folder, network) -> str:
    return str(save_scores(folder / "s.safetensors", question_scores(network, QUESTIONS), network, METHOD))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_lowest_rows_and_their_biases_move_and_nothing_else(make, tmp_path):
    module = causal(make())
    scores = question_scores(module.model, QUESTIONS)
    chosen = dict(zip(scores, lowest_nodes(list(scores.values()), 20)))
    before = copied(module)
    trainer = fit(module, LoKI(20, scores_file(tmp_path, module.model)))
    held = 0
    for weight in weights_by_role(module.model):
        old, new = before[f"model.{weight.name}"], module.state_dict()[f"model.{weight.name}"]
        matrix = weight.name.replace(".bias", ".weight")
        if matrix not in chosen:
            assert torch.equal(old, new), weight.name
            continue
        nodes = 1 if weight.layout == "in_out" else 0
        changed = (old != new).flatten() if weight.is_bias else (old != new).any(1 - nodes)
        assert changed.nonzero().flatten().tolist() == chosen[matrix].tolist()
        held += len(chosen[matrix]) * (1 if weight.is_bias else old.shape[1 - nodes])
    # Optimizer state of that size and no more.
    assert sum(state["exp_avg"].numel() for state in trainer.optimizers[0].state.values()) == held


def test_a_step_is_that_of_full_fine_tuning_on_these_rows(tmp_path):
    made = []
    for callback in (LoKI(30, scores_file(tmp_path, tiny_llama())), None):
        module = causal(tiny_llama(), optimizer="sgd")
        fit(module, None, callbacks=[callback] if callback else [], max_steps=1)
        made.append(module.state_dict())
    for name, rows in callback._rows.items() if callback else ():
        torch.testing.assert_close(made[0][name][rows], made[1][name][rows], rtol=0, atol=1e-6)
    downs = [name for name in made[0] if "down_proj" in name]
    start = tiny_llama().state_dict()
    for name in downs:
        moved = (made[0][name] != start[name.removeprefix("model.")]).any(1)
        assert int(moved.sum()) == 9  # floor(0.3 * 32)
        torch.testing.assert_close(made[0][name][moved], made[1][name][moved], rtol=0, atol=1e-6)


def test_scores_from_questions_are_kept_where_the_file_is_to_be(tmp_path):
    path = tmp_path / "made.safetensors"
    callback = LoKI(scores=str(path), questions=TEXTS)
    module = causal(tiny_llama(), tokenizer=tiny_tokenizer())
    fit(module, callback)
    questions = [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]
    expected = question_scores(tiny_llama(), questions)
    kept, provenance = load_scores(path, tiny_llama(), METHOD)
    assert provenance["steps"] == 7
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value)
    again = LoKI(scores=str(path), questions=["never read"])
    fit(causal(tiny_llama(), tokenizer=tiny_tokenizer()), again)
    assert all(torch.equal(rows, callback._rows[name]) for name, rows in again._rows.items())


def test_a_resumed_run_has_its_rows_from_the_checkpoint(tmp_path):
    """The trained network would give other scores, and the file may have gone."""
    path = scores_file(tmp_path, tiny_llama())
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole = causal(tiny_llama())
    fit(whole, None, callbacks=[LoKI(20, path), saving], max_steps=4, enable_checkpointing=True)
    (tmp_path / "s.safetensors").unlink()
    resumed = causal(tiny_llama())
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=4, callbacks=[LoKI(20, path)], enable_checkpointing=False, **quiet)
    trainer.fit(resumed, Rows("tokens", batch_size=12), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_picture(tmp_path):
    fit(causal(tiny_llama()), LoKI(20, scores_file(tmp_path, tiny_llama()), picture=True), default_root_dir=tmp_path)
    assert (tmp_path / "loki.png").stat().st_size > 1000


def test_the_command_line_makes_the_file(tmp_path, capsys):
    folder = tmp_path / "net"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(f'{{"question": "{text}"}}' for text in TEXTS))
    output = tmp_path / "scores.safetensors"
    main(["select", "--method", METHOD, "--model", str(folder), "--data", str(rows), "--output", str(output)])
    assert f"scores of 2 weights from {len(TEXTS)} questions" in capsys.readouterr().out
    made, provenance = load_scores(output, tiny_llama(), METHOD)
    assert provenance["questions"] == len(TEXTS)
    questions = [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]
    for name, value in question_scores(tiny_llama(), questions).items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-8)
    assert not list(tmp_path.glob("*.shards"))
    with pytest.raises((ValueError, SystemExit), match=r"no 'prompt'|2"):
        main(
            [
                "select",
                "--method",
                METHOD,
                "--model",
                str(folder),
                "--data",
                str(rows),
                "--output",
                str(output),
                "--column",
                "prompt",
            ]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quota": 0}, "quota=0 must be a percentage"),
        ({"scores": None}, "needs scores="),
        ({"steps": 1}, "steps=1"),
        ({"baseline": "mean"}, "baseline='mean'"),
    ],
)
def test_bad_arguments_name_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoKI(**{"scores": "s", **arguments})


def test_refuses_what_does_not_fit_the_network(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        fit(causal(tiny_llama()), LoKI(scores=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="another network"):
        fit(causal(tiny_llama(layers=3)), LoKI(scores=scores_file(tmp_path, tiny_llama())))
    with pytest.raises(ValueError, match="experts"):
        fit(causal(tiny_mixtral()), LoKI(scores=scores_file(tmp_path, tiny_llama())))
    with pytest.raises(ValueError, match="less than one"):
        fit(causal(tiny_llama()), LoKI(2, scores_file(tmp_path, tiny_llama())))
    assert down_weights(weights_by_role(tiny_llama()))
