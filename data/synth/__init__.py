"""Synthetic clips: ``python -m data.synth``."""

SCENES = ("sunrise", "memory")
"""What they show: `data.synth.scenes` or `data.synth.worlds`."""
