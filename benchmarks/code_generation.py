"""PEFT techniques for code generation (papers 62 and 118): from signature and docstring to the body, at equal steps.

    .venv/bin/python benchmarks/code_generation.py [--steps 12] [--only "LoRA r=8" full] [--picture FILE]

What a column means stands in `peft_runs`. Paper 62 (arXiv 2308.10462) finds LoRA ahead of IA3, prefix and prompt tuning
and QLoRA as good for half the memory; paper 118 (arXiv 2208.13928) compares full fine-tuning, embeddings and head
(L-EO), the last block (L-LDB) and prefixes.
"""

from __future__ import annotations

from peft_runs import METHODS, draw, parser, results_of, table, warnings_off

LEFT_OUT = ("LoRA, attention", "LoRA, early half", "LoRA, late half")  # of paper 76: `peft_table`


def main() -> None:
    arguments = parser((__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--examples", type=int, default=1000, help="functions to train on")
    arguments.add_argument("--picture", default="outputs/code_generation.png", help="quality against memory")
    options = arguments.parse_args()
    warnings_off()
    names = options.only or [name for name in METHODS if name not in LEFT_OUT]
    made = {name: one for (name, _), one in results_of(names, [options.examples], options).items()}
    print(f"{options.steps} steps of 4 of {options.examples} functions, {options.held_out} held out")
    print(table(made))
    draw(made, options.picture)


if __name__ == "__main__":
    main()
