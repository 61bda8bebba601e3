"""Shards of latents and text embeddings: making them from videos, checking them, streaming them in an exact order.

Commands: `data.prepare` turns videos into shards, `data.check` verifies them, `data.bench` measures the loader,
`data.synth` makes the synthetic clips of the default run. To build on them, open `data.shards.sample` for what one
entry holds, `data.shards.manifest` for what a folder says about itself, `data.shards.writer` to write one,
`data.encoders` for the model families, `data.shards.order` for which samples a step gets, `data.shards.stream` to read
them, `data.io.remote` for where from.
"""

import logging

# diffusers imports transformers' CLIPImageProcessor, which warns where torchvision is missing, though its replacement
# serves as well: a line before each command's own.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision (not installed)" not in record.getMessage()
)
