"""Parts of folders of shards, and several folders as one: manifests whose samples are read where they lie.

Nothing is written. A view keeps the folder of its (first) manifest as its home, whose empty prompt it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace

from data.errors import DataError
from data.shards.manifest import Manifest
from data.shards.shard_info import SampleInfo


def cut(manifest: Manifest, frames: int) -> Manifest:
    """The samples with their first latent frames, `frames` at most; shorter ones stay as they are.

    Whether that is the shorter clip's latent is the encoder's to know (`data.encoders.check_cut`).
    """

    def shorter(sample: SampleInfo) -> SampleInfo:
        channels, stored, height, width = sample.shape
        if stored <= frames:
            return sample
        return replace(sample, shape=(channels, frames, height, width), stored=stored)

    shards = [replace(shard, samples=tuple(map(shorter, shard.samples))) for shard in manifest.shards]
    return replace(manifest, shards=tuple(shards))


def only(manifest: Manifest, numbers: Collection[int]) -> Manifest:
    """The samples of these numbers, in their order; shards without any are left out.

    Raises:
        DataError: there are none.
    """
    wanted, count = set(numbers), itertools.count()
    kept = []
    weights = manifest.weights or (1.0,) * len(manifest.shards)
    for shard, *more in zip(manifest.shards, manifest.urls, manifest.maps, weights, strict=True):
        samples = tuple(sample for sample in shard.samples if next(count) in wanted)
        if samples:
            kept.append((replace(shard, samples=samples), *more))
    if not kept:
        raise DataError(f"{manifest.home}: no sample is left of it")
    shards, urls, maps, weights = zip(*kept, strict=True)
    return replace(manifest, shards=shards, urls=urls, maps=maps, weights=weights)


def joined(manifests: Sequence[Manifest], weights: Sequence[float] = ()) -> Manifest:
    """Several folders as one, their samples numbered through.

    Args:
        manifests: of the folders.
        weights: how often the samples of each come in an epoch; none is once.

    Raises:
        DataError: they were encoded otherwise, or at another pace.
    """
    first = manifests[0]
    for other in manifests[1:]:
        if other.encoder != first.encoder:
            raise DataError(
                f"{other.home}: was made with {other.encoder}, {first.home} with {first.encoder}; shards that are "
                "mixed have to be of one encoder: make one of them anew"
            )
        if other.fps != first.fps:
            raise DataError(
                f"{other.home}: has {other.fps:g} frames a second, {first.home} {first.fps:g}; make one of them anew"
            )
    return replace(
        first,
        shards=tuple(shard for manifest in manifests for shard in manifest.shards),
        urls=tuple(url for manifest in manifests for url in manifest.urls),
        maps=tuple(mapped for manifest in manifests for mapped in manifest.maps),
        weights=tuple(weight for manifest, weight in zip(manifests, weights, strict=True) for _ in manifest.shards)
        if weights
        else (),
        map=None,
    )
