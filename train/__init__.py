"""Training: adapters of video diffusion transformers, LoRA length extension, export."""

__version__ = "0.1.0"
