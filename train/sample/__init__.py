"""Generating videos with diffusers' own pipelines and radial attention: ``python -m train.sample``.

`settings` is what a user may set, `pipeline` loads the model and its LoRAs, `denoise` gives each step its attention,
`ranks` splits the work over GPUs, `decode` turns latents into frames in bounded memory, `video` writes and compares,
`generate` does all of it, and `records` knows what is done.
"""
