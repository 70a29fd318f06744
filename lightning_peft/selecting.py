"""`lightning-peft select`: scores that selections are made from, written as a file that later fits read.

A part of the command line, so it may import the data modules.
"""

from __future__ import annotations

from typing import Any

from lightning_peft.scores import save_scores

METHODS = ("knowledge-vectors", "expert-routing")


def select(
    method: str,
    model: str,
    data: Any,
    output: str,
    column: str = "question",
    split: str = "train",
    limit: int | None = None,
    batch_size: int = 4,
    steps: int = 7,
    baseline: str = "zero",
    device: str = "auto",
    dtype: str = "float32",
) -> str:
    """Scores the parts of a network for a selection that trains some of them.

    Stopped on the way, the same command goes on where it stood (of "knowledge-vectors", whose passes are many): shards
    stand beside the output until it is whole.

    Args:
        method: "knowledge-vectors" (LoKI's attribution of feed-forward neurons, paper 21) or "expert-routing" (ESFT's
            scores of experts, paper 116).
        model: Hub name, folder, GGUF file or "package:NAME/PATH".
        data: Questions, or texts of the task: a hub name, a path, or a list of rows, as for `InstructionData`.
        output: The file of scores.
        column: The column with the texts; a question ends where its answer begins.
        split: The split of the data.
        limit: Questions at most, from the front.
        batch_size: Questions at once.
        steps: Steps of the integral.
        baseline: "zero" or "token0".
        device: "auto" takes a GPU if there is one.
        dtype: "float32", "bfloat16", "float16" or "auto" (as stored).

    Returns:
        A line that says what was written.

    Raises:
        ValueError: The method is unknown, or the data lacks the column or is empty.
    """
    import shutil
    from pathlib import Path

    import torch
    from tqdm import tqdm

    from lightning_peft.attribution.expert_routing import routing_scores
    from lightning_peft.attribution.knowledge_vectors import question_scores
    from lightning_peft.datamodules.sources import read_rows
    from lightning_peft.models.pretrained import load_pretrained, load_tokenizer

    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known: use one of {METHODS}.")
    rows = read_rows(data, split)
    if column not in rows.column_names:
        raise ValueError(f"the data has the columns {sorted(rows.column_names)} and no {column!r}: name it by column=.")
    texts = [row[column] for row in rows.select(range(min(limit or len(rows), len(rows))))]
    if not texts:
        raise ValueError("the data has no question.")
    tokenizer = load_tokenizer(model)
    questions = [tokenizer(text)["input_ids"] for text in texts]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_pretrained("AutoModelForCausalLM", model, dtype).to(device)
    shards = Path(f"{output}.shards")
    with tqdm(total=len(questions), desc=method) as bar:

        def progress(done: int) -> None:
            bar.update(done - bar.n)

        if method == "expert-routing":
            scores = routing_scores(network, questions, progress=progress)
            settings: dict[str, Any] = {}
        else:
            scores = question_scores(network, questions, steps, baseline, batch_size, shards, progress=progress)
            settings = {"steps": steps, "baseline": baseline}
    save_scores(output, scores, network, method, questions=len(questions), model=model, **settings)
    shutil.rmtree(shards, ignore_errors=True)
    what = "routers" if method == "expert-routing" else "weights"
    return f"{output}: scores of {len(scores)} {what} from {len(questions)} questions"
