"""Shards of latents and text embeddings: making them from videos, checking them, streaming them in an exact order.

Read these five files first, in this order:

    shards/sample.py       what one entry of a shard holds
    shards/manifest.py     what a folder of shards states about itself
    shards/order.py        which samples a step gets
    shards/stream.py       from shards to batches, in that order
    prepare/run.py         from videos to shards

The folders:

    io/            bytes and files from wherever they lie: remote, locked, tried again, written whole
    shards/        samples, manifest, writer, reader, order, stages, stream, batches; entries of others' tars
    encoders/      VAE, its streamed decoder, and text encoders, one file a model family
    prepare/       `python -m data.prepare`: lists of videos, decoding, clips, restarts
    synth/         `python -m data.synth`: the synthetic clips of the default run

Beside them are the commands `data.index`, which makes a manifest for tars that somebody else wrote, `data.check`, which
reads every byte of shards and names what is damaged, `data.caption`, which describes videos that have no caption,
`data.recaption`, which gives shards other captions, and `data.bench`, which measures the loader. A user's own stages of
the stream are in `shards/stages.py`.
`README.md` beside this file is the manual.
"""

import logging

# diffusers imports transformers' CLIPImageProcessor, which warns where torchvision is missing, though its replacement
# serves as well: a line before each command's own.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision (not installed)" not in record.getMessage()
)
