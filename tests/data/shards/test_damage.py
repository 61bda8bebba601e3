"""Streaming over damage: what is skipped, counted, replaced and closed, and when it stops the run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data.errors import DataError
from data.shards.manifest import FILE, Manifest
from data.shards.reader import SampleReader
from data.shards.stream import LatentStream, read_samples
from tests.helpers.batches import assert_equal, open_shards, order_of
from tests.helpers.damage import DAMAGE, damage, offset_of, skipped


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damaged_samples_are_skipped_counted_and_named(
    manifest: Manifest, kind: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, bad = DAMAGE[kind]
    whole = list(LatentStream(manifest, order_of(manifest), num_steps=12))
    spoil(manifest)
    again = Manifest.load(manifest.folder)
    stream = LatentStream(again, order_of(again), num_steps=12, workers=workers)
    found = list(stream)
    for batch, good in zip(found, whole, strict=True):
        for key, expected in zip(batch.keys, good.keys, strict=True):
            assert key not in bad and (key == expected or expected in bad)
        assert batch.latent.shape == good.latent.shape
    assert sorted(skipped(caplog)) == bad, "each is named once"
    # Ranks of one sequence-parallel group read the same and so replace the same.
    twin = LatentStream(Manifest.load(manifest.folder), order_of(manifest), num_steps=12)
    assert_equal(list(twin), found)


def test_too_many_damaged_samples_stop_the_run(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    DAMAGE["whole"][0](manifest)
    allowed = LatentStream(manifest, order_of(manifest), num_steps=20, max_bad=5)
    assert len(list(allowed)) == 20 and len(skipped(caplog)) == 5
    batches = LatentStream(manifest, order_of(manifest), num_steps=20, max_bad=4, workers=2)
    with pytest.raises(DataError, match=r"shard-00001.tar: sample s00\d: .*\(5 damaged samples, at most 4") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    for most, message in (
        (0, "1 damaged sample, at most 0 are skipped"),
        (1, "2 damaged samples, at most 1 is skipped"),
    ):
        with pytest.raises(DataError, match=message):
            list(LatentStream(manifest, order_of(manifest), num_steps=20, max_bad=most))


def test_a_shape_without_a_good_sample_stops_the_run(make_folder: Any) -> None:
    manifest = make_folder(5)
    damage(manifest, 0, 0, b"\0" * manifest.shards[0].bytes)
    with pytest.raises(DataError, match=r"\(every sample of shape \[4, 3, 2, 2\] is damaged; python -m data.check"):
        list(LatentStream(manifest, order_of(manifest, 1), num_steps=5))


def test_a_shard_that_cannot_be_reached_stops_the_run(manifest: Manifest) -> None:
    (manifest.folder / manifest.shards[1].file).unlink()
    with pytest.raises(DataError, match=r"shard-00001.tar: cannot be read \(No such file"):
        list(LatentStream(manifest, order_of(manifest), num_steps=12))


def test_what_stood_in_is_closed_again(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shard may be over, and then nothing else would close it."""
    DAMAGE["whole"][0](manifest)
    left: list[int] = []
    close = SampleReader.close
    monkeypatch.setattr(SampleReader, "close", lambda self: left.append(open_shards(manifest)) or close(self))
    for steps in range(1, 12):
        list(LatentStream(manifest, order_of(manifest), num_steps=steps))
    assert left == [0] * 11


def test_read_samples_refuses_damage(manifest: Manifest) -> None:
    damage(manifest, 1, offset_of(manifest, 1, "s007.json"), b"]")
    with pytest.raises(DataError, match="shard-00001.tar: sample s007: s007.json is not JSON"):
        list(read_samples(manifest))


def test_a_manifest_of_other_shapes_is_noticed(manifest: Manifest) -> None:
    path = manifest.folder / FILE
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["shards"][0]["samples"][0]["shape"] = [4, 9, 2, 2]
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(DataError, match=r"shard-00000.tar: sample s000: latent has shape \[4, 3, 2, 2\], the manifest"):
        list(read_samples(manifest.folder))
