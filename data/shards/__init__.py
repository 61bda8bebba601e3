"""Shards: their samples, manifest, writing, order and streaming."""
