"""Held-out clips: losses, the table, the Euler sampler; measures of generated clips."""
