"""A folder of shards: written whole or not at all, and told apart when it is not what its manifest says."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import resource
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import DataError
from data.io.files import write_bytes
from data.shards.manifest import EMPTY_PROMPT, FILE, Manifest
from data.shards.sample import Prompt
from data.shards.writer import ShardWriter

ABOUT: dict[str, Any] = {
    "fps": 16.0,
    "encoder": "e",
    "latent": "l",
    "text": "t",
    "arguments": {},
    "empty_prompt": Prompt({}, {}),
}


def test_manifest_tells_what_was_written(make_folder: Any) -> None:
    manifest = make_folder(12, frames=lambda i: 3 + i % 2)
    assert [len(shard.samples) for shard in manifest.shards] == [5, 5, 2]
    assert [info.key for info in manifest.samples] == [f"s{i:03d}" for i in range(12)]
    assert manifest.shapes()[2] == [(4, 3, 2, 2), (4, 4, 2, 2)]
    for shard in manifest.shards:
        content = (manifest.folder / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    empty = manifest.load_empty_prompt()
    assert not empty.text["umt5"].mask.any() and empty.pooled == {}
    assert Manifest.load(manifest.folder / FILE) == manifest
    assert sorted(p.name for p in manifest.folder.iterdir()) == [
        "empty_prompt.safetensors",
        "manifest.json",
        *(shard.file for shard in manifest.shards),
    ]


def test_equal_samples_give_equal_bytes(make_folder: Any) -> None:
    one, two = make_folder(7, "one"), make_folder(7, "two")
    for name in sorted(p.name for p in one.folder.iterdir()):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes(), name


def test_shards_are_bounded_in_bytes(tmp_path: Path, make_sample: Any) -> None:
    limit = 2 * tarfile.RECORDSIZE
    with ShardWriter(tmp_path / "a", max_bytes=limit, **ABOUT) as writer:
        for i in range(20):
            writer.write(make_sample(i))
    shards = Manifest.load(tmp_path / "a").shards
    assert all(shard.bytes <= limit for shard in shards) and sum(len(shard.samples) for shard in shards) == 20
    for shard, following in itertools.pairwise(shards):
        entries = [*shard.samples, following.samples[0]]
        assert sum(entry.bytes for entry in entries) + 2 * tarfile.BLOCKSIZE > limit, "one more would have fitted"
    with ShardWriter(tmp_path / "b", max_bytes=1, **ABOUT) as writer:
        writer.write(make_sample(0))
        writer.write(make_sample(1))
    assert len(Manifest.load(tmp_path / "b").shards) == 2


def test_writer_refuses_what_would_spoil_a_folder(tmp_path: Path, make_folder: Any, make_sample: Any) -> None:
    finished = make_folder(2)
    with pytest.raises(DataError, match="finished already"):
        ShardWriter(finished.folder, **ABOUT)
    with pytest.raises(DataError, match="max_samples is 0"):
        ShardWriter(tmp_path / "x", max_samples=0, **ABOUT)
    for fps in (0, float("nan")):
        with pytest.raises(DataError, match=f"fps is {fps}, expected frames a second, above 0"):
            ShardWriter(tmp_path / "x", **{**ABOUT, "fps": fps})
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        ShardWriter(tmp_path / "file", **ABOUT)
    with pytest.raises(DataError, match="no sample was written"), ShardWriter(tmp_path / "empty", **ABOUT):
        pass
    with pytest.raises(DataError, match="s001: this key"), ShardWriter(tmp_path / "twice", **ABOUT) as writer:
        writer.write(make_sample(1))
        writer.write(make_sample(1))
    assert list((tmp_path / "twice").iterdir()) == []


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files end at 1000 bytes, for this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def open_files(folder: Path) -> list[str]:
    """Those of this process in the folder."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them is gone
            links.append(str(descriptor.readlink()))
    return [link for link in links if link.startswith(str(folder))]


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, make_sample: Any, full_disk: None) -> None:
    """Closing a file writes what is left of it, and fails like the writing itself."""
    with pytest.raises(OSError, match="File too large"):
        write_bytes(tmp_path / "a", bytes(3000))
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="File too large"), ShardWriter(tmp_path / "b", **ABOUT) as writer:
        writer.write(make_sample(0))
        assert open_files(tmp_path)
        writer.write(dataclasses.replace(make_sample(1), latent=torch.zeros(1, 1, 128, 128)))
    assert not open_files(tmp_path) and not list((tmp_path / "b").iterdir())


def test_manifest_errors(tmp_path: Path, make_folder: Any) -> None:
    manifest = make_folder(7)
    path = manifest.folder / FILE
    raw = json.loads(path.read_text(encoding="utf-8"))

    def refused(change: dict[str, Any], message: str) -> None:
        path.write_text(json.dumps({**raw, **change}), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            Manifest.load(manifest.folder)
        path.write_text(json.dumps(raw), encoding="utf-8")

    with pytest.raises(DataError, match=r"nowhere/manifest.json: no manifest"):
        Manifest.load(tmp_path / "nowhere")
    refused({"format": "other"}, "not a manifest of shards")
    refused({"version": 1}, "version is 1, this code reads 2")
    refused({"fps": "16"}, "fps is '16', expected int or float")
    for fps in (0, -1.5, float("nan"), float("inf")):
        refused({"fps": fps}, rf"manifest.json: fps is {fps}, expected frames a second, above 0; make the folder anew")
    refused({"shards": [{"samples": [{"key": "a", "shape": [1, 2]}]}]}, r"shards\[0\].samples\[0\].shape is \[1, 2\]")
    negative = {"key": "a", "shape": [1, 1, 1, 1], "offset": -1, "bytes": 5}
    refused({"shards": [{"samples": [negative]}]}, r"samples\[0\].offset is -1 and bytes 5, expected a place")
    refused({"shards": [{"file": "x", "samples": []}]}, r"shards\[0\].bytes is None, expected int")
    whole = raw["shards"][0]
    for name in ("x.tar; touch PWNED", "../x.tar", "/etc/x", "$(id).tar", ".x.tar", "-x.tar", "x.tar\n", ""):
        refused({"shards": [{**whole, "file": name}]}, r"shards\[0\].file is .*, expected a file name of letters")
    for digest in ("../x", "0" * 63, "G" * 64):
        refused({"shards": [{**whole, "sha256": digest}]}, r"shards\[0\].sha256 is .*, expected 64 hexadecimal digits")
    refused({"samples": 8}, "samples is 8, but 7 are listed")
    refused({"rejected": "1"}, "rejected is '1', expected int")
    refused({"shards": raw["shards"] * 2}, "key s000 is listed twice")
    path.write_text(json.dumps({name: value for name, value in raw.items() if name != "samples"}), encoding="utf-8")
    assert Manifest.load(manifest.folder) == manifest, "counts are younger than the format"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        Manifest.load(manifest.folder)
    path.write_text(json.dumps(raw), encoding="utf-8")

    (manifest.folder / "shard-00001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00001.tar: missing"):
        Manifest.load(manifest.folder)
    (manifest.folder / EMPTY_PROMPT).write_bytes(b"x")
    with pytest.raises(DataError, match=r"empty_prompt.safetensors: cannot be read"):
        manifest.load_empty_prompt()
    (manifest.folder / EMPTY_PROMPT).unlink()
    with pytest.raises(DataError, match=r"empty_prompt.safetensors: cannot be read \(No such file .* empty prompt"):
        manifest.load_empty_prompt()


KILLED = """
import os, signal, sys, torch
from data.shards.sample import Prompt, Sample
from data.shards.writer import ShardWriter
renames, replace = 0, os.replace
def dying(*args):
    global renames
    renames += 1
    if renames == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = dying
with ShardWriter(sys.argv[1], fps=16.0, encoder="e", latent="l", text="t", arguments={},
                 empty_prompt=Prompt({}, {"p": torch.ones(1)}), max_samples=2) as writer:
    for i in range(4):
        writer.write(Sample(f"k{i}", torch.full((1, 1, 1, 1), float(i)), {}, {}, {}, {"caption": ""}))
"""


# The renames are those of two shards, the empty prompt and the manifest.
@pytest.mark.parametrize("rename", [2, 4])
def test_killed_writer_leaves_no_manifest_and_no_half_file(tmp_path: Path, rename: int) -> None:
    def write(dying: int) -> int:
        return subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(dying)], timeout=300).returncode

    assert write(rename) == -9
    with pytest.raises(DataError, match="no manifest"):
        Manifest.load(tmp_path)
    whole = sorted(tmp_path.glob("shard-*.tar"))
    assert len(whole) == min(rename - 1, 2)
    for path in whole:
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 4
    (tmp_path / "shard-00007.tar").touch()
    (tmp_path / "mine.tar").touch()
    assert write(0) == 1, "a shard that no writer began is nobody's to remove"
    assert sorted(tmp_path.glob("shard-*.tar")) == [*whole, tmp_path / "shard-00007.tar"]
    (tmp_path / "shard-00007.tar").unlink()

    assert write(0) == 0
    assert [info.key for info in Manifest.load(tmp_path).samples] == ["k0", "k1", "k2", "k3"]
    assert torch.equal(Manifest.load(tmp_path).load_empty_prompt().pooled["p"], torch.ones(1))
    names = ["empty_prompt.safetensors", "manifest.json", "mine.tar", "shard-00000.tar", "shard-00001.tar"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
