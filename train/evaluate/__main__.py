"""``python -m train.evaluate``: the command line."""

from __future__ import annotations

from radial.cli.command import Command
from train.evaluate.settings import Job, Settings


def evaluate(settings: Settings) -> None:
    """Evaluates and prints the table."""
    job = Job.of(settings)
    from train.evaluate.run import run_evaluation  # takes seconds to import

    print(run_evaluation(job))
    print(f"\nEverything is in {job.out}")


main = Command(
    "python -m train.evaluate",
    "Measures a run's model, or another LoRA on its base model, against controls without a LoRA: the loss on held-out "
    "clips by noise level and length, paired over clips, and generated clips, which are measured for repetition, "
    "temporal consistency and drifting colours. Writes a table, a page, and the clips with a prompt file as VBench's "
    "custom_input mode reads them. A command that was stopped goes on.",
    Settings,
    evaluate,
    [
        "python -m train.evaluate run=runs/shapes_4x/<time>",
        "python -m train.evaluate run=runs/wan_4x/<time> shards=shards/held_out prompts=prompts.txt lengths=1,4",
        "python -m train.evaluate run=runs/wan_4x/<time> lora=other.safetensors:0.8 against=dense out=other",
    ],
    positional="run",
)

if __name__ == "__main__":
    main.run()
