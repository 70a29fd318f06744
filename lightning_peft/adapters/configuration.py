"""PEFT configs as a YAML gives them: checked names, the task's own heads, and JSON for checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

#: Names of the heads that PEFT trains whole for a task (`PeftModelForSequenceClassification` and its like).
TASK_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}

TASK_OF_CLASS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def closest(name: str, known: Iterable[str], n: int = 3) -> str:
    """ "Closest: a, b", for error messages; all names where few are known."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=n, cutoff=0.5)
    if near:
        return f"closest: {', '.join(near)}"
    return f"known: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"


def as_config(given: PeftConfig | dict[str, Any]) -> PeftConfig:
    """A PEFT config of the right class, a copy: injection writes into it.

    Args:
        given: A config, or its `peft_type` and arguments as a dictionary.

    Raises:
        ValueError: The type or an argument is not known; the message names the closest.
        TypeError: `given` is neither.
    """
    if isinstance(given, PeftConfig) and type(given) is not PeftConfig:
        return copy.deepcopy(given)
    if isinstance(given, PeftConfig):  # jsonargparse reads {"peft_type": ..., "task_type": ...} as the base class
        blank = PeftConfig()
        values = {f.name: getattr(given, f.name) for f in dataclasses.fields(PeftConfig)}
        given = {k: v for k, v in values.items() if k == "peft_type" or v != getattr(blank, k)}
    if not isinstance(given, dict):
        raise TypeError(f"config={given!r} is neither a PeftConfig nor a dictionary such as {{'peft_type': 'LORA'}}.")
    arguments = {name: value for name, value in given.items() if name != "peft_type"}
    known = {str(member.value): cls for member, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    peft_type = given.get("peft_type")
    peft_type = str(getattr(peft_type, "value", peft_type)).upper() if peft_type else None
    if peft_type is None:
        raise ValueError("config has no peft_type: say which method, as in {'peft_type': 'LORA', 'r': 8}.")
    if peft_type not in known:
        raise ValueError(f"peft_type={peft_type!r} is not known to PEFT; {closest(peft_type, known)}.")
    fields = {field.name for field in dataclasses.fields(known[peft_type]) if field.init}
    for name in arguments:
        if name not in fields:
            raise ValueError(f"{known[peft_type].__name__} has no argument {name!r}; {closest(name, fields)}.")
    return known[peft_type](**arguments)


def to_json(config: PeftConfig) -> str:
    """The config as JSON (a checkpoint holds nothing that `weights_only=True` would refuse)."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

    return json.dumps(config.to_dict(), default=plain, sort_keys=True)


def from_json(text: str) -> PeftConfig:
    """What `to_json` wrote."""
    return as_config({name: value for name, value in json.loads(text).items() if name != "peft_version"})


def infer_task(network: nn.Module) -> str | None:
    """PEFT's task type by the network's class, `None` if it has none."""
    name = type(network).__name__
    for ending, task in TASK_OF_CLASS.items():
        if name.endswith(ending):
            return task
    if name.endswith("ForConditionalGeneration"):
        encodes = getattr(getattr(network, "config", None), "is_encoder_decoder", False)
        return "SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM"
    return None


def for_network(config: PeftConfig, network: nn.Module, modules_to_save: list[str] | None = None) -> PeftConfig:
    """The config with the network's task, and with that task's heads among the modules that train whole.

    Raises:
        ValueError: A name in `target_modules` or `modules_to_save` matches nothing; the message names the closest.
    """
    if config.task_type is None:
        config.task_type = infer_task(network)
        if config.task_type is None and config.is_prompt_learning:
            config.task_type = "FEATURE_EXTRACTION"
    if hasattr(config, "modules_to_save"):
        own = [*(config.modules_to_save or []), *(modules_to_save or [])]
        _check_names(own, network, "modules_to_save")
        heads = TASK_HEADS.get(str(config.task_type), [])
        own += [name for name in heads if name not in own and _is_untrained_head(network, name)]
        config.modules_to_save = own or None
    elif modules_to_save:
        raise ValueError(f"{type(config).__name__} takes no modules_to_save: got {modules_to_save}.")
    _check_names(getattr(config, "target_modules", None), network, "target_modules")
    return config


def _is_untrained_head(network: nn.Module, name: str) -> bool:
    """Whether the network has a head of this name that no earlier adapter trains: it has one, whatever the adapters."""
    from peft.utils.other import ModulesToSaveWrapper

    found = [module for path, module in network.named_modules() if path.rpartition(".")[2] == name]
    return bool(found) and not any(isinstance(module, ModulesToSaveWrapper) for module in found)


def _check_names(given: Any, network: nn.Module, argument: str) -> None:
    names = [name for name, _ in network.named_modules() if name]
    if isinstance(given, str):
        if given == "all-linear" or any(re.fullmatch(given, name) for name in names):
            return
        raise ValueError(f"{argument}={given!r}, read as a regular expression, matches no module of the network.")
    for target in given or []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            # The last part of each name is how targets are usually given.
            parts = {name.rpartition(".")[2] for name in names}
            parts = {part for part in parts if not part.isdigit()}
            raise ValueError(
                f"{argument}: {type(network).__name__} has no module named {target!r}; {closest(target, parts)}."
            )
