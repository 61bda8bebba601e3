"""How a model's attention falls off with distance, and what a mask would keep: ``python -m train.decay``."""
