"""`make demo`: SmolLM2-135M learns docstring -> body on the standard library, plainly and concept-aware.

Both train the model for equally many steps. Prints held-out next-token loss before and after, one completion before and
after, and where the files are: the adapter, the loss curves, the loss by position for each head.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def run(command: str, config: dict[str, Any], name: str, folder: Path, seed: int) -> Any:
    """Runs one command of the command line from a config that is kept beside its results."""
    from lightning_peft.training_cli import FineTuningCLI

    config["seed_everything"] = seed
    config["trainer"]["logger"]["init_args"] = {"save_dir": str(folder), "name": name}
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return FineTuningCLI(args=[command, "--config", str(path)])


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The same run without heads: as many steps for the model, no stage before it."""
    config = copy.deepcopy(config)
    config["trainer"]["max_epochs"] -= 1
    config["trainer"]["callbacks"] = [
        c for c in config["trainer"]["callbacks"] if not c["class_path"].endswith(("Schedule", "PositionLoss"))
    ]
    config["model"]["class_path"] = "lightning_peft.models.CausalLM"
    arguments = config["model"]["init_args"]
    kept = ("model", "learning_rate", "warmup_steps", "weight_decay", "lr_scheduler")
    config["model"]["init_args"] = {key: arguments[key] for key in kept if key in arguments}
    return config


def completion(cli: Any) -> tuple[str, str]:
    """The first held-out prompt and what the network continues it with."""
    batch = next(iter(cli.datamodule.val_dataloader()))
    row = {key: value[:1] for key, value in batch.items() if hasattr(value, "ndim")}
    answered = (row["labels"][0] != -100).nonzero()[0].item()
    cli.model.generation["max_new_tokens"] = 48
    cli.model.eval()
    prompt = cli.model.tokenizer.decode(row["input_ids"][0, :answered], skip_special_tokens=True)
    return prompt, cli.model.predict_step(row, 0)[0]


def indented(text: str, lines: int = 12) -> str:
    """At most so many lines of a text, indented."""
    return "\n".join("    " + line for line in text.strip().splitlines()[:lines])


def main(
    config: str = str(HERE / "quickstart.yaml"),
    out: str = "outputs/demo",
    seeds: tuple[int, ...] = (7,),
    model: str | None = None,
    max_steps: int | None = None,
) -> None:
    """Runs the demo.

    Args:
        config: The concept-aware run.
        out: Folder for everything that is written.
        seeds: One pair of runs for each.
        model: Another network than the config's.
        max_steps: Fewer steps in each epoch than the config's.
    """
    began, folder = time.monotonic(), Path(out)
    settings = yaml.safe_load(Path(config).read_text())
    if model is not None:
        settings["model"]["init_args"]["model"] = model
    if max_steps is not None:
        settings["trainer"] |= {"limit_train_batches": max_steps, "limit_val_batches": 1}

    before = run("validate", plain(settings), "before", folder, seeds[0])
    start = float(before.trainer.callback_metrics["val_loss"])
    prompt, first = completion(before)
    print(f"held-out loss before: {start:.4f}", flush=True)

    rows, steps = [], []
    for seed in seeds:
        losses = []
        for name, asked in (("plain", plain(settings)), ("concept_aware", copy.deepcopy(settings))):
            cli = run("fit", asked, f"{name}_{seed}", folder, seed)
            losses.append(float(cli.trainer.callback_metrics["val_loss"]))
            steps.append(cli.trainer.global_step)
        rows.append((seed, *losses))

    from lightning_peft.export import export

    adapter = folder / "adapter"
    export(cli.model, adapter)
    _, last = completion(cli)
    print(f"\nprompt\n{indented(prompt)}\n\nbefore\n{indented(first)}\n\nafter (concept-aware)\n{indented(last)}\n")
    print(f"held-out next-token loss, {steps[0]} steps of the model in each run")
    print(f"{'seed':>6} {'before':>9} {'plain':>9} {'concept-aware':>14}")
    for seed, *losses in rows:
        print(f"{seed:>6} {start:>9.4f} {losses[0]:>9.4f} {losses[1]:>14.4f}")
    print(f"\nadapter   {adapter}")
    for picture in sorted(folder.rglob("*.png")):
        print(f"picture   {picture}")
    print(f"took {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=str(HERE / "quickstart.yaml"), help="the concept-aware run")
    parser.add_argument("--out", default="outputs/demo", help="folder for everything that is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7], help="one pair of runs for each")
    options = parser.parse_args()
    main(options.config, options.out, tuple(options.seeds))
