"""``python -m train.bench``: a training step, measured and taken apart."""

from __future__ import annotations

from radial.cli.command import Command
from train.bench.steps import Options, measure

main = Command(
    "python -m train.bench",
    "Measures a LoRA step of each pattern on each number of GPUs that share the clip (sp), on random weights of "
    "model=wan_14b. With conf=hunyuan_4x, or any other run, model and frames are that run's unless they are given too."
    "\n\n"
    "Every layer runs its case's pattern. pattern=dense is the baseline: its layers keep their input alone "
    "(parallel.activations=full), and at most 4 are measured. Speed-ups are those of a layer; that of the whole model "
    "with the run's dense layers is worked out from them.",
    Options,
    measure,
    ["python -m train.bench frames=321 layers=2 sp=1,2 parallel.activations=selective trainer.compile=true"],
    others="those of a run: parallel.activations=selective trainer.compile=true lora.rank=64 clip.height=480",
)

if __name__ == "__main__":
    main.run()
