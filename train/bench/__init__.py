"""A training step, measured and taken apart: ``python -m train.bench``."""
