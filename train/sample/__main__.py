"""``python -m train.sample``: the command line."""

from __future__ import annotations

from radial.cli.command import Command
from radial.cli.ranks import Rank
from train.sample.settings import Settings, settled


def sample(settings: Settings, others: dict[str, str]) -> None:
    """Generates."""
    settings, model = settled(settings, others)
    from train.sample.generate import generate  # takes seconds to import

    paths = generate(settings, model)
    if Rank.here().index == 0:
        print("\n".join(map(str, paths)))


main = Command(
    "python -m train.sample",
    "Generates videos with a diffusers pipeline and radial attention. The LoRA's header holds how it was trained: what "
    "is not given comes from there. A video that is there is not made again; many prompts go on where they stopped.",
    Settings,
    sample,
    [
        'python -m train.sample model=wan_14b model.path=weights/wan_14b lora=wan_4x.safetensors prompt="a boat"',
        "python -m train.sample model=wan_14b model.path=weights/wan_14b lora=wan_4x.safetensors:0.9 "
        "add=style.safetensors:0.8 prompts=prompts.txt out=clips",
        'python -m train.sample model=wan_14b model.path=weights/wan_14b prompt="…" frames=69 decay=0.2 '
        "dense_layers=1 dense_steps=12 compare=dense",
        "torchrun --nproc-per-node 8 -m train.sample …      # half of the GPUs a prompt, its tokens shared by four",
    ],
    others="model=NAME, a file of conf/model such as wan_14b, hunyuan or mochi (required), model.path=FOLDER, the "
    "pipeline's diffusers folder or hub:org/name (required), and the others of section model (python -m train --help "
    "model)",
)

if __name__ == "__main__":
    main.run()
