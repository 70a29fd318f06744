"""Plain `peft` knows our tuners once `lightning_peft` is imported, whichever comes first; nothing heavy for that."""

from __future__ import annotations

import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

from lightning_peft.adapters import TUNERS, add_peft_type, register
from lightning_peft.adapters.bottleneck import BottleneckConfig
from tests.adapters.networks import IDS, adapted, answer, filled

FOLDER = "import sys; folder = sys.argv[1]; ids = {ids}; import torch; torch.set_num_threads(1); "
ORDERS = {
    "lightning_peft first": "import lightning_peft, peft; ",
    "peft first": "import peft, lightning_peft; ",
    "the tuner's file first": "import lightning_peft.adapters.bottleneck, peft; ",
}
LOAD = (
    "from peft import PeftModel; from transformers import AutoModelForCausalLM as A; "
    "net = PeftModel.from_pretrained(A.from_pretrained(folder + '/base'), folder + '/adapter').eval(); "
    "import json; print(json.dumps(net(input_ids=torch.tensor(ids))[0].tolist()))"
)


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_importing_the_adapters_imports_no_torch_and_no_peft():
    code = (
        "import sys, lightning_peft, lightning_peft.adapters; "
        "print(sorted({'torch', 'peft', 'transformers', 'lightning'} & set(sys.modules)))"
    )
    assert python(code) == "[]"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    network = adapted("llama", BottleneckConfig(bottleneck=4))
    adapted("llama", BottleneckConfig(bottleneck=4)).unload().save_pretrained(folder / "base")
    filled(network).save_pretrained(folder / "adapter")
    return folder, answer(network, "llama")


@pytest.mark.parametrize("order", ORDERS)
def test_plain_peft_loads_what_we_saved(order, saved):
    folder, expected = saved
    made = json.loads(python(FOLDER.format(ids=IDS.tolist()) + ORDERS[order] + LOAD, str(folder)))
    torch.testing.assert_close(torch.tensor(made), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("module", [*sorted({t.module.rpartition(".")[2] for t in TUNERS}), "beside", "injection"])
def test_all_are_registered_whichever_file_comes_first(module):
    code = (
        f"import lightning_peft.adapters.{module}, peft; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as M; "
        "from lightning_peft.adapters import TUNERS; print(all(t.name.upper() in M for t in TUNERS))"
    )
    assert python(code) == "True"


def test_registration_changes_nothing_the_second_time():
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    register(TUNERS)
    assert before == PEFT_TYPE_TO_TUNER_MAPPING


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_a_tuners_type_is_a_member_like_peft_s_own(tuner):
    member = PeftType(tuner.name.upper())
    assert member is PeftType[tuner.name.upper()] is getattr(PeftType, tuner.name.upper()) is add_peft_type(tuner.name)
    assert member in list(PeftType)
    assert member.value == tuner.name.upper() == str(member.value)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member].__name__ == tuner.config
    assert PEFT_TYPE_TO_TUNER_MAPPING[member].__name__ == tuner.model
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member]().peft_type is member


def test_a_config_makes_the_way_through_a_file(tmp_path):
    config = BottleneckConfig(form="sequential", position="both", scale="learned", layers_to_transform=1)
    config.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is BottleneckConfig
    assert (loaded.form, loaded.position, loaded.scale, loaded.layers_to_transform) == (
        "sequential",
        "both",
        "learned",
        [1],
    )


def test_injection_by_peft_itself():
    from tests.adapters.networks import base

    network = peft.inject_adapter_in_model(BottleneckConfig(bottleneck=4), base("llama"))
    assert not isinstance(network, PeftModel)
    assert any(p.requires_grad for p in network.parameters())
    assert all("bottleneck_" in name for name, p in network.named_parameters() if p.requires_grad)
