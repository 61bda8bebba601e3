"""A tuned model against controls: held-out losses, generated clips and what is measured of them, `python -m
train.evaluate`."""
