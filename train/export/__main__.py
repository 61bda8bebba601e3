"""``python -m train.export``: the command line."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors import SafetensorError

from train.cli import files_with_strengths, flag, guarded, number
from train.config.compose import split_arguments
from train.errors import UserError

USAGE = """python -m train.export run=<run folder> [format=comfyui,...] [merge=true] [dtype=bf16] [out=<folder>]

Writes a run's LoRA in the formats of other tools, loads each again with the tool's own loader, and prints what arrived.

  run          the run folder
  checkpoint   a step-* folder of it (the newest)
  format       some of diffusers, comfyui, kohya, peft, released (all that the model has)
  out          where to (<run>/export); replaced as a whole
  dtype        fp32 or bf16 (adapters fp32, merged models as the base model is stored)
  merge        true: also the base model with the LoRA in its weights, a diffusers folder of sharded safetensors
  strength     of the LoRA in the merged model (1.0)
  add          further LoRAs in the merged model, with strengths: style.safetensors:0.8,other.safetensors
  add_2        those of the expert for low noise levels, of a run that trained two

examples:
  python -m train.export run=runs/wan_4x/<time>
  python -m train.export run=runs/wan_4x/<time> format=comfyui dtype=bf16
  python -m train.export run=runs/wan_4x/<time> merge=true dtype=bf16 add=style.safetensors:0.8"""
_KEYS = ("run", "checkpoint", "format", "out", "dtype", "merge", "strength", "add", "add_2")


def main(arguments: list[str]) -> None:
    """Exports, and prints what was written and loaded."""
    settings = split_arguments(arguments)
    unknown = settings.keys() - set(_KEYS)
    if unknown:
        raise UserError(f"{min(unknown)} is not a known key, expected one of {', '.join(_KEYS)}")
    if "run" not in settings:
        raise UserError("run is not set, give run=<run folder> such as run=runs/shapes_4x/<time>")
    merged = flag("merge", settings.get("merge", "false"))
    from train.export.run import export_run  # takes seconds to import

    run, checkpoint = Path(settings["run"]).expanduser(), settings.get("checkpoint")
    out = Path(settings["out"]).expanduser() if settings.get("out") else run / "export"
    try:
        lines = export_run(
            run,
            out=out,
            checkpoint=Path(checkpoint).expanduser() if checkpoint else None,
            formats=settings["format"].split(",") if "format" in settings else None,
            merged=merged,
            dtype=settings.get("dtype"),
            strength=number("strength", settings.get("strength", "1")),
            add=files_with_strengths("add", settings["add"]) if "add" in settings else (),
            add_2=files_with_strengths("add_2", settings["add_2"]) if "add_2" in settings else (),
        )
    except (OSError, SafetensorError) as error:  # a full disk is the second one of safetensors
        raise UserError(f"the export to {out} failed ({error}): make room, or give another out") from error
    print("\n".join(lines))


if __name__ == "__main__":
    guarded(main, sys.argv[1:], USAGE)
