"""Shards of latents and text embeddings: their schema, writing, order and streaming.

Open `data.sample` for what one entry holds, `data.manifest` for what a folder of shards says about itself,
`data.writer` to make one, `data.order` for which samples a step gets, `data.stream` to read them, and
`data.synth` for the synthetic clips of the default run. The package needs torch, webdataset and safetensors.
"""
