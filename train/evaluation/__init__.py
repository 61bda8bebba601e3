"""Held-out clips: losses, the table, the Euler sampler."""
