"""The command line: `lightning-peft fit|validate|test|predict|list|choose|select|merge|export`.

Each command imports what it needs and no more, so that `list` and `--help` are quick.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

USAGE = """usage: lightning-peft COMMAND [arguments]

Fine-tuning papers as PyTorch Lightning callbacks, mixins and data modules.

  fit        train a model           (LightningCLI: --config, --model, --data, --trainer.callbacks, --print_config)
  validate   loss on held-out data   (the same arguments, --ckpt_path last|best|PATH)
  test       loss on test data       (the same)
  predict    text, classes or vectors (the same)
  list       the papers and what implements them
  choose     a method for a task, a number of examples and a memory, with the rule and its paper
  select     scores of a network's parts, from which a selection takes what trains
  merge      several fine-tuned checkpoints into one
  export     a training checkpoint into a folder that transformers or peft loads

`lightning-peft COMMAND --help` tells a command's arguments; `lightning-peft fit --model.help CausalLM`,
`--data.help InstructionData` and `--trainer.callbacks.help HalfFineTuning` those of one class."""

RUNS = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: The command line without the program's name; by default that of the process.

    Raises:
        SystemExit: The command line is wrong (2), or help was asked for (0).
    """
    given = sys.argv[1:] if args is None else list(args)
    command = given[0] if given else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "--version":
        from lightning_peft import __version__

        print(f"lightning-peft {__version__}")
    elif command == "list":
        _list(given[1:])
    elif command in ("choose", "select", "merge", "export"):
        _call(command, given[1:])
    elif command in RUNS or command.startswith("-"):
        from lightning_peft.training_cli import FineTuningCLI

        FineTuningCLI(args=None if args is None else given)
    else:
        print(USAGE, file=sys.stderr)
        print(f"\nerror: {command!r} is not a command.", file=sys.stderr)
        raise SystemExit(2)


def _list(args: list[str]) -> None:
    from lightning_peft import listing, registry

    parser = argparse.ArgumentParser("lightning-peft list", description="The papers and what implements them.")
    parser.add_argument("--format", choices=("table", "json", "markdown"), default="table")
    parser.add_argument("--built", action="store_true", help="only papers that are built")
    options = parser.parse_args(args)
    rows = [row for row in registry.TECHNIQUES if row.components or not options.built]
    if options.format == "json":
        print(json.dumps([row.row() for row in rows], indent=2, ensure_ascii=False))
    elif options.format == "markdown":
        print(listing.markdown(rows), end="")
    else:
        print(listing.table(rows))


def _call(command: str, args: list[str]) -> None:
    """Runs a library function whose arguments are those of its signature."""
    import importlib
    import inspect

    from jsonargparse import ArgumentParser

    modules = {
        "choose": "lightning_peft.choosing",
        "select": "lightning_peft.selecting",
        "merge": "lightning_peft.merging",
        "export": "lightning_peft.export",
    }
    function = getattr(importlib.import_module(modules[command]), command)
    parser = ArgumentParser(prog=f"lightning-peft {command}", description=(function.__doc__ or "").split("\n\n")[0])
    parser.add_argument("-c", "--config", action="config", help="The same arguments from a YAML or JSON file.")
    parser.add_function_arguments(function)
    signature = inspect.signature(function).parameters
    lists = {name for name, parameter in signature.items() if "list[" in str(parameter.annotation)}
    config = parser.instantiate_classes(parser.parse_args(_gathered(args, lists)))
    try:
        made = function(**{name: value for name, value in config.as_dict().items() if name in signature})
    except ValueError as wrong:
        if command != "choose":
            raise
        parser.error(str(wrong))  # there is nothing in it but its arguments
    if made is not None:
        print(made)


def _gathered(args: list[str], lists: set[str]) -> list[str]:
    """`--models A B` as `--models ["A", "B"]`, which is how jsonargparse reads a list."""
    out: list[str] = []
    rest = list(args)
    while rest:
        out.append(rest.pop(0))
        if out[-1].removeprefix("--").replace("-", "_") not in lists or not out[-1].startswith("--"):
            continue
        values = []
        while rest and not rest[0].startswith("-"):
            values.append(rest.pop(0))
        out.append(values[0] if len(values) == 1 and values[0].startswith("[") else json.dumps(values))
    return out
