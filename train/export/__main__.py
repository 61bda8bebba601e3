"""``python -m train.export``: the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from radial.cli.command import Command
from radial.cli.settings import setting
from train.errors import UserError
from train.lora.file_lists import files_with_strengths


@dataclass
class Options:
    """What is exported, and how."""

    run: Path = setting("the run folder")
    checkpoint: Path | None = setting("a step-* folder of it, or its name alone; null: the newest", None)
    format: list[str] | None = setting(
        "some of diffusers, comfyui, kohya, peft, released; null: all that the model has", None
    )
    out: Path | None = setting("where to, replaced as a whole; null: <run>/export", None)
    dtype: str | None = setting(
        "of the files; null: adapters fp32, merged models as the base model is stored", None, ("fp32", "bf16")
    )
    merge: bool = setting(
        "also the base model with the LoRA in its weights, a diffusers folder of sharded safetensors", False
    )
    strength: float = setting("of the LoRA in the merged model", 1.0)
    add: str | None = setting(
        "further LoRAs in the merged model, with strengths: style.safetensors:0.8,other.safetensors", None, path=True
    )
    card: bool = setting("also a model card for the hub, README.md in the folder; of a LoRA", False)
    push: str | None = setting("upload the LoRA's folder with its card: hub:<organisation>/<name>", None)
    add_2: str | None = setting("those of the expert for low noise levels, of a run that trained two", None, path=True)


def export(options: Options) -> None:
    """Exports, and prints what was written and loaded."""
    from train.export.hub import repository, upload
    from train.export.run import export_run  # takes seconds to import

    out = options.out or options.run / "export"
    name = None if options.push is None else repository(options.push)
    try:
        lines = export_run(
            options.run,
            out=out,
            checkpoint=options.checkpoint,
            formats=options.format,
            merged=options.merge,
            dtype=options.dtype,
            strength=options.strength,
            add=files_with_strengths("add", options.add) if options.add is not None else (),
            add_2=files_with_strengths("add_2", options.add_2) if options.add_2 is not None else (),
            card=options.card or name is not None,
        )
    except (OSError, SafetensorError) as error:  # a full disk is the second one of safetensors
        raise UserError(f"the export to {out} failed ({error}): make room, or give another out") from error
    print("\n".join(lines))
    if name is not None:
        print(upload(out, name))


main = Command(
    "python -m train.export",
    "Writes a run's LoRA in the formats of other tools, loads each again with the tool's own loader, and prints what "
    "arrived.",
    Options,
    export,
    [
        "python -m train.export run=runs/wan_4x/<time>",
        "python -m train.export run=runs/wan_4x/<time> format=comfyui dtype=bf16",
        "python -m train.export run=runs/wan_4x/<time> push=hub:<organisation>/<name>",
        "python -m train.export run=runs/wan_4x/<time> merge=true dtype=bf16 add=style.safetensors:0.8",
    ],
)

if __name__ == "__main__":
    main.run()
