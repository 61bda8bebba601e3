"""``python -m train.sample``: the command line."""

from __future__ import annotations

import sys

from data.cli import usage
from train.cli import guarded
from train.ranks import global_rank
from train.sample.settings import Settings, parse_settings


def help_text() -> str:
    """The text of --help."""
    return usage(
        Settings,
        "python -m train.sample model=NAME model.path=FOLDER prompt=TEXT [lora=FILE] [key=value ...]",
        "Generates videos with a diffusers pipeline and radial attention. The LoRA's header holds how it was trained: "
        "what is not\ngiven comes from there. A video that is there is not made again; many prompts go on where they "
        "stopped.\n\n  model            a file of conf/model: wan_14b, hunyuan, mochi, ... (required)\n"
        "  model.path       the pipeline's diffusers folder, or hub:org/name (required)",
        [
            'python -m train.sample model=wan_14b model.path=weights/wan_14b lora=wan_4x.safetensors prompt="a boat"',
            "python -m train.sample model=wan_14b model.path=weights/wan_14b lora=wan_4x.safetensors:0.9 "
            "add=style.safetensors:0.8 --prompts prompts.txt out=clips",
            'python -m train.sample model=wan_14b model.path=weights/wan_14b prompt="…" frames=69 decay=0.2 '
            "dense_layers=1 dense_steps=12 compare=dense",
            "torchrun --nproc-per-node 8 -m train.sample …      # half of the GPUs a prompt, its tokens shared by four",
        ],
    )


def main(arguments: list[str]) -> None:
    """Generates."""
    settings, model = parse_settings(arguments)
    from train.sample.generate import generate  # takes seconds to import

    paths = generate(settings, model)
    if global_rank() == 0:
        print("\n".join(map(str, paths)))


if __name__ == "__main__":
    guarded(main, sys.argv[1:], help_text())
