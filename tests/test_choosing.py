"""Which method is recommended: each rule by hand, memory by arithmetic, and callbacks that can be pasted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from lightning_peft.choosing import METHODS, choose
from lightning_peft.cli import main

#: task, examples, memory, parameters, priority -> method, paper. Written from the findings, not from the code.
CASES = [
    # few or a medium number of examples: LoRA ends better, full fine-tuning converges faster
    (("classification", 100, None, None, "quality"), ("LoRA", 76)),
    (("generation", 1000, None, None, "quality"), ("LoRA", 76)),
    (("classification", 100, None, None, "speed"), ("full fine-tuning", 76)),
    # many: full fine-tuning ends best and converges no faster
    (("classification", 10_000, None, None, "quality"), ("full fine-tuning", 76)),
    (("generation", 10_000, None, None, "speed"), ("LoRA", 76)),
    # what is kept
    (("generation", 100, None, None, "size"), ("IA3", 76)),
    (("code", 10_000, None, None, "size"), ("IA3", 76)),
    # code
    (("code", 2000, None, None, "quality"), ("LoRA", 62)),
    (("code", 2000, 16, "7B", "quality"), ("QLoRA", 62)),
    # 7 B weights: 112 GB, 70 GB, 14 GB, 3.9 GB; three quarters of the memory may be used
    (("generation", 10_000, 150, "7B", "quality"), ("full fine-tuning", 76)),
    (("generation", 10_000, 149, "7B", "quality"), ("half fine-tuning", 58)),
    (("generation", 10_000, 94, "7e9", "quality"), ("half fine-tuning", 58)),
    (("generation", 10_000, 93, 7e9, "quality"), ("LoRA", 76)),
    (("generation", 10_000, 19, "7b", "quality"), ("LoRA", 76)),
    (("generation", 10_000, 18, "7000M", "quality"), ("QLoRA", 62)),
    (("classification", 100, 24, "7B", "speed"), ("LoRA", 76)),
]


@pytest.mark.parametrize(("given", "expected"), CASES, ids=str)
def test_each_rule(given, expected):
    made = choose(*given)
    assert (made.method, made.paper) == expected
    assert made.rule


def test_what_memory_forbids_is_told():
    made = choose("generation", 10_000, 80, "7B")
    assert made.memory == pytest.approx(14.0)
    assert made.passed_over == ("full fine-tuning, about 112.0 of 60.0 GB", "half fine-tuning, about 70.0 of 60.0 GB")
    assert "does not fit: full fine-tuning" in str(made)


def test_selective_placement_and_bitfit_are_told():
    assert any("attention alone, or late blocks" in hint for hint in choose("generation", 100).hints)
    assert any("BitFit" in hint for hint in choose("classification", 100).hints)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "chat"}, "task='chat' is not known: use one of classification, generation, code"),
        ({"priority": "cost"}, "priority='cost' is not known: use one of quality, speed, size"),
        ({"examples": 0}, "examples=0 must be at least 1"),
        ({"memory": -1}, "memory=-1 must be more than 0"),
        ({"memory": 8}, "without parameters"),
        ({"parameters": "seven"}, "parameters='seven' is no number of weights: write 135M, 7B or 7e9"),
        ({"parameters": "1.2.3"}, "is no number of weights"),
        ({"memory": 2, "parameters": "70B"}, r"no method fits memory=2 GB.*QLoRA, about 39\.4 of 1\.5 GB.*smaller"),
    ],
)
def test_bad_input_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose(**{"task": "generation", "examples": 100, **arguments})


@pytest.mark.parametrize("method", METHODS)
def test_the_callback_can_be_pasted(method):
    from jsonargparse import ArgumentParser

    from lightning_peft.callbacks import PEFT, HalfFineTuning

    callback = METHODS[method][1]
    if callback is None:
        assert method == "full fine-tuning"
        return
    parser = ArgumentParser()
    parser.add_argument("--callback", type=HalfFineTuning | PEFT)
    made = parser.instantiate_classes(parser.parse_args([f"--callback={yaml.safe_dump(callback)}"])).callback
    assert f"{type(made).__module__}.{type(made).__name__}".startswith("lightning_peft.callbacks.")


def test_the_command_prints_method_rule_paper_and_callback(capsys):
    main(["choose", "--task", "code", "--examples", "2000", "--memory", "16", "--parameters", "7B"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "QLoRA"
    assert "rule: on a base in 4 bits" in shown[1]
    assert shown[2].strip() == (
        "paper 62: Exploring Parameter-Efficient Fine-Tuning Techniques for Code Generation with Large Language Models"
    )
    assert yaml.safe_load(shown[-1].strip()) == {"trainer.callbacks": [METHODS["QLoRA"][1]]}


def test_the_command_tells_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        main(["choose", "--help"])
    shown = capsys.readouterr().out
    for argument in ("task", "examples", "memory", "parameters", "priority"):
        assert f"--{argument}" in shown
    with pytest.raises(SystemExit) as exit_:
        main(["choose", "--task", "chat", "--examples", "5"])
    assert exit_.value.code == 2
    assert "task='chat' is not known" in capsys.readouterr().err


def test_choosing_loads_nothing_heavy():
    code = "import sys; from lightning_peft.choosing import choose; choose('code', 9); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "lightning", "transformers"} & set(out.split())
