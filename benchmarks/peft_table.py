"""PEFT techniques with little, more and much data (paper 76, arXiv 2304.14999), at equal steps.

    .venv/bin/python benchmarks/peft_table.py [--steps 12] [--examples 8 24 1000] [--only "LoRA r=8" full]

The paper compares full fine-tuning, LoRA, (IA)^3, BitFit and prompt tuning of FLAN-T5-XL with 100, 1,000 and 10,000
examples, and adapters in parts of the network alone. Here the numbers are such that the steps (4 functions each) pass
over them six times, twice, and not once. What a column means stands in `peft_runs`.
"""

from __future__ import annotations

from peft_runs import draw, parser, results_of, table, warnings_off

METHODS = (
    "untuned",
    "full",
    "HalfFineTuning",
    "L-LDB",
    "BitFit",
    "SliceFine r=8",
    "LoRA r=8",
    "LoRA, attention",
    "LoRA, early half",
    "LoRA, late half",
    "IA3",
    "prompt tuning",
)


def main() -> None:
    arguments = parser((__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--examples", type=int, nargs="+", default=[8, 24, 1000], help="functions to train on")
    arguments.add_argument("--picture", default="outputs/peft_table.png", help="quality against memory, most data")
    options = arguments.parse_args()
    warnings_off()
    made = results_of(options.only or METHODS, options.examples, options)
    for size in options.examples:
        print(f"\n{options.steps} steps of 4 of {size} functions, {options.held_out} held out")
        print(table({name: one for (name, n), one in made.items() if n == size}))
    draw({name: one for (name, n), one in made.items() if n == max(options.examples)}, options.picture)


if __name__ == "__main__":
    main()
