"""The schema of a shard entry: what goes through unchanged, and what is refused in which words."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.shards.reader import decode
from data.shards.sample import Sample, TextTokens


def test_entry_round_trip_keeps_every_bit(make_sample: Any) -> None:
    sample = make_sample(7)
    entry = sample.to_entry()
    back = Sample.from_entry(entry)
    assert entry == make_sample(7).to_entry()
    assert back.key == sample.key and back.meta == sample.meta and back.caption == "clip 7"
    assert back.latent.dtype == torch.bfloat16 and torch.equal(back.latent, sample.latent)
    assert torch.equal(back.text["umt5"].tokens, sample.text["umt5"].tokens)
    assert torch.equal(back.text["umt5"].mask, sample.text["umt5"].mask)
    assert torch.equal(back.pooled["clip"], sample.pooled["clip"])
    assert torch.equal(back.image["first"], sample.image["first"])


def test_views_and_shared_storage_are_packed(make_sample: Any) -> None:
    sample = make_sample(0)
    view = sample.latent.transpose(2, 3)
    back = Sample.from_entry(dataclasses.replace(sample, latent=view, image={"a": view, "b": view}).to_entry())
    assert torch.equal(back.latent, view) and torch.equal(back.image["b"], view)


TEXT = TextTokens(torch.zeros(3, 2), torch.ones(2, dtype=torch.bool))
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"key": "a.b"}, "'a.b': bad key"),
    ({"key": "__a"}, "'__a': bad key"),
    ({"latent": torch.zeros(4, 3, 2)}, r"s000: latent has shape \(4, 3, 2\), expected 4 dimensions"),
    ({"latent": torch.zeros(4, 0, 2, 2)}, "s000: latent is empty"),
    ({"latent": torch.zeros(4, 3, 2, 2).half()}, "s000: latent is torch.float16, expected bfloat16 or float32"),
    ({"latent": torch.full((4, 3, 2, 2), torch.nan)}, "s000: latent holds NaN"),
    ({"text": {"t": TEXT}}, r"s000: text.t.mask is torch.bool \(2,\), expected torch.bool \(3,\)"),
    ({"text": {"t.u": TEXT}}, "s000: text.t.u has a bad name"),
    ({"pooled": {"p": torch.zeros(2, 2)}}, r"s000: pooled.p has shape \(2, 2\), expected 1 dim"),
    ({"image": {"i": torch.zeros(2, dtype=torch.uint8)}}, "s000: image.i is torch.uint8, expected a floating"),
    ({"meta": {}}, "s000: meta.caption is None, expected a string"),
    ({"meta": {"caption": "", "x": object()}}, "s000: meta is not JSON"),
    ({"meta": {"caption": "", "x": float("nan")}}, "s000: meta is not JSON"),
    ({"meta": {"caption": "half a \ud83d"}}, "s000: meta is not JSON .*surrogates not allowed"),
    ({"meta": {"caption": "", "source": "caf\udce9.mp4"}}, "s000: meta is not JSON .*surrogates not allowed"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes_name_key_and_field(make_sample: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        dataclasses.replace(make_sample(0), **change).to_entry()
    assert "\n" not in str(caught.value)


def test_damaged_entries_are_refused(make_sample: Any) -> None:
    entry = make_sample(0).to_entry()
    extra = safetensors.torch.save({"latent": torch.zeros(1, 1, 1, 1), "audio": torch.zeros(1)})
    unmasked = safetensors.torch.save({"latent": torch.zeros(1, 1, 1, 1), "text.t": torch.zeros(1, 1)})
    for change, message in [
        ({"safetensors": entry["safetensors"][:-3]}, "s000.safetensors cannot be read"),
        ({"safetensors": extra}, "unknown tensor audio"),
        ({"safetensors": unmasked}, "text.t has no text.t.mask"),
        ({"safetensors": safetensors.torch.save({"pooled.p": torch.zeros(1)})}, "latent is missing, found pooled.p"),
        ({"json": b"{"}, "s000.json is not JSON"),
        ({"json": json.dumps([1]).encode()}, "s000.json holds a list"),
    ]:
        with pytest.raises(DataError, match=message):
            Sample.from_entry({**entry, **change})
    del entry["json"]
    with pytest.raises(DataError, match=r"s000.json is missing"):
        Sample.from_entry(entry)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_breaks_more_than_its_sample(make_folder: Any, data: st.DataObject) -> None:
    """Whatever bytes stand in a sample's place, reading it gives a valid sample or a DataError."""
    content, info = _entry(make_folder)
    damaged = content.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        decode(damaged, info).validate()
    except DataError as error:
        assert info.key in str(error) and "\n" not in str(error)


def test_decoded_tensors_are_views(make_folder: Any) -> None:
    content, info = _entry(make_folder)
    sample = decode(content, info)
    storage = content.untyped_storage().data_ptr()
    for tensor in (sample.latent, sample.text["umt5"].tokens, sample.pooled["clip"], sample.image["first"]):
        assert tensor.untyped_storage().data_ptr() == storage


_ENTRIES: list[tuple[torch.Tensor, Any]] = []


def _entry(make_folder: Any) -> tuple[torch.Tensor, Any]:
    """The bytes of a sample in its tar, and what the manifest says of it."""
    if not _ENTRIES:
        manifest = make_folder(1)
        info = manifest.samples[0]
        whole = (manifest.folder / manifest.shards[0].file).read_bytes()
        part = bytearray(whole[info.offset : info.offset + info.bytes])
        _ENTRIES.append((torch.frombuffer(part, dtype=torch.uint8), info))
    return _ENTRIES[0]
