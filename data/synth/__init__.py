"""Synthetic clips: ``python -m data.synth``."""
