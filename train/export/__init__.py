"""Taking a trained LoRA away: adapter files for diffusers, ComfyUI, kohya and PEFT, and merged checkpoints.

`formats` writes, `verify` loads what was written as its users will, `tools` knows which tool reads which file, `merge`
streams a whole model, `card` describes the LoRA for the hub that `hub` pushes it to, `run` exports a training run. How
layers are called, and how LoRAs of other tools are read, is in `train.lora`.
"""
