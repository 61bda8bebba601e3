"""Taking a trained LoRA away: adapter files for diffusers, ComfyUI, kohya and PEFT, and merged checkpoints.

`names` knows what the original checkpoints call their layers, `formats` writes, `reading` reads any LoRA, `verify`
loads what was written as its users will, `merge` streams a whole model, `run` exports a training run.
"""
