"""Training: adapters of video diffusion transformers, LoRA length extension, export."""
