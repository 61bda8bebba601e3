"""LoRAs: their layers in a model, their files in every format, their names and scales."""
