"""`python -m data.prepare upload=s3://…`: shards move to a real S3 server, which the tests start, the manifest last."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from data import check
from data.errors import DataError
from data.prepare import run
from data.prepare import upload as uploads
from data.prepare.__main__ import main
from data.prepare.records import read_records
from data.prepare.upload import Upload
from data.shards.manifest import Manifest
from data.shards.stream import read_samples
from radial.errors import Mistake
from tests.helpers.prepared import FAST, LENGTHS, command, write_clips

s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install -e '.[dev]'")
SMALL = "shard_gb=0.00003"  # a clip or two in each


def there(address: str) -> set[str]:
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    return {name.rpartition("/")[2] for name in store.ls(address)} if store.exists(address) else set()


def same_samples(address: str, folder: Path) -> None:
    """The address holds the clips of the folder, whole."""
    assert check.main([address]) == 0
    expected = {sample.key: sample for sample in read_samples(folder)}
    for sample in read_samples(address):
        assert torch.equal(sample.latent, expected.pop(sample.key).latent)
    assert not expected


def test_a_killed_run_goes_on_and_is_visible_once_all_is_there(tmp_path: Path, videos: Path, bucket: str) -> None:
    out, address = tmp_path / "out", f"{bucket}/killed"
    words = [f"source={videos}", *FAST, SMALL]
    process = subprocess.Popen(command(*words, f"out={out}", f"upload={address}"), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(out.glob(".prepare/record-*"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = there(address)
    assert len(before) >= 2 and "manifest.json" not in before and not (out / "manifest.json").exists()

    assert main([*words, f"out={out}", f"upload={address}"]) == 0
    assert before < there(address) and not list(out.glob("*.tar")) and not (out / ".prepare").exists()
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    same_samples(address, tmp_path / "whole")
    assert len(list(read_samples(address))) == sum(LENGTHS.values())


@pytest.mark.parametrize("last", ["shard-000-00001.tar", "videos.json", "manifest.json"])
def test_killed_before_or_after_any_file_arrives(
    tmp_path: Path, videos: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """No file of what is there counts until the manifest is, and the same command brings the rest."""
    words = [f"source={videos}", f"out={tmp_path / 'out'}", *FAST, SMALL]
    send, sent = Upload.send, Upload.send
    for moment in ("before", "after"):
        address = f"{bucket}/{hashlib.sha256(f'{last} {moment}'.encode()).hexdigest()[:8]}"
        asked = [*words[:1], f"out={tmp_path / moment}", *words[2:], f"upload={address}"]

        def dies(self: Upload, file: Path, moment: str = moment) -> None:
            if moment == "after" or file.name != last:
                send(self, file)
            if file.name == last:
                raise RuntimeError("killed")

        monkeypatch.setattr(uploads.Upload, "send", dies)
        with pytest.raises(RuntimeError, match="killed"):
            main(asked)
        assert ("manifest.json" in there(address)) == ((last, moment) == ("manifest.json", "after"))
        monkeypatch.setattr(uploads.Upload, "send", sent)
        assert main(asked) == 0
        assert len(list(read_samples(address))) == sum(LENGTHS.values()) and check.main([address]) == 0


def test_videos_are_appended(tmp_path: Path, videos: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On any rank: names of shards that have moved are not taken again. Until the end, what was there can be read."""
    address = f"{bucket}/appended"
    words = [f"source={videos}", f"out={tmp_path / 'out'}", *FAST, SMALL, f"upload={address}"]
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(words) == 0
    first = Manifest.load(address)
    write_clips(videos, 6, 20)
    write_clips(videos, 7, 20)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert Manifest.load(address) == first
        assert main(words) == 0
    files = [shard.file for shard in Manifest.load(address).shards]
    assert len(files) == len(set(files)) > len(first.shards) and check.main([address]) == 0
    assert len(list(read_samples(address))) == sum(LENGTHS.values()) + 4


def test_what_is_there_already_is_not_written_over(tmp_path: Path, videos: Path, bucket: str) -> None:
    words = [f"source={videos}", *FAST]
    for name in ("shard-000-00000.tar", "manifest.json", "videos.json", "rejected.jsonl", "empty_prompt.safetensors"):
        address = f"{bucket}/taken-{name}"
        s3fs.S3FileSystem().pipe_file(f"{address}/{name}", b"somebody's")
        with pytest.raises(DataError, match=f"upload is {address}, which holds {name} already"):
            main([*words, f"out={tmp_path / 'out'}", f"upload={address}"])
        assert not (tmp_path / "out").exists() and there(address) == {name}


@pytest.mark.parametrize("place", ["videos/x", "missing", "missing/x", "file", "far/away", "http", "https"])
def test_a_store_that_cannot_be_written_is_named_before_weights_are_loaded(
    tmp_path: Path, videos: Path, bucket: str, address: str, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A bucket whose policy lets nobody write, one that is not there, a file, a folder far down, a web server, none."""
    (tmp_path / "file").touch()
    addresses = {"file": f"{tmp_path}/file", "far/away": f"{tmp_path}/far/away"}
    addresses |= {"http": f"{address}/videos", "https": "https://127.0.0.1:1/x"}
    asked = addresses.get(place, f"s3://{place}")
    if place == "videos/x":

        async def refuses(self: Any, target: str, value: bytes, **more: Any) -> None:
            raise PermissionError("Access Denied")

        monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", refuses)
        s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(run, "load_encoder", lambda *_: pytest.fail("loads weights"))
    with pytest.raises(DataError, match=f"^upload is {asked}: (cannot be written|fsspec does not write there)"):
        main([f"source={videos}", f"out={tmp_path / 'out'}", *FAST, f"upload={asked}"])
    assert not (tmp_path / "out").exists() and not (tmp_path / "far").exists()
    assert s3fs.S3FileSystem().ls("") == ["videos"]


def test_shards_move_to_a_folder_that_is_made_and_check_says_where(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, far = tmp_path / "out", tmp_path / "far"
    assert main([f"source={videos}", f"out={out}", *FAST, f"upload={far}/"]) == 0
    assert check.main([str(far)]) == 0 and len(list(read_samples(far))) == sum(LENGTHS.values())
    assert not list(far.glob("write-test*"))
    with pytest.raises(DataError, match=f"^{out}: holds no shards, they were moved to {far}; .*data.check {far}`"):
        check.main([str(out)])
    with pytest.raises(DataError, match=rf"shard-000-00000.tar: missing, .* moved it to {far}: give that address$"):
        Manifest.load(out)


def test_a_store_without_a_manifest_is_told_as_one(bucket: str) -> None:
    s3fs.S3FileSystem().pipe_file(f"{bucket}/begun/shard-000-00000.tar", b"one of many")
    with pytest.raises(DataError, match=r"begun/manifest.json: no manifest; correct the address, or wait until"):
        Manifest.load(f"{bucket}/begun")


@pytest.mark.parametrize("address", ["", "/", "s3://", "file:///"])
def test_an_address_that_is_empty_is_refused(tmp_path: Path, videos: Path, address: str) -> None:
    with pytest.raises(Mistake, match=f"^upload is {address or 'empty'}, expected .* variable of the shell not set"):
        main([f"source={videos}", f"out={tmp_path / 'out'}", *FAST, f"upload={address}"])


def test_out_itself_is_refused(tmp_path: Path, videos: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(tmp_path)
    for address in (f"{out}/", f"file://{out}", f"{tmp_path}/link/out"):
        with pytest.raises(DataError, match=r"^upload is .*/out, which is out= itself"):
            main([f"source={videos}", f"out={out}", *FAST, f"upload={address}"])
    assert not out.exists()


def test_an_address_is_kept_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(uploads.fsspec.core, "url_to_fs", lambda address: (asked.append(address), "x")[::-1])
    for given, kept in {
        "ftp://me:a@b:c@host:21/x/": "ftp://me@host:21/x",
        "ftp://me@host/x": "ftp://me@host/x",
        "abfs://box@account.dfs.core.windows.net/a:b@c": "abfs://box@account.dfs.core.windows.net/a:b@c",
    }.items():
        assert Upload(given).address == kept and asked[-1] == given.rstrip("/")


def test_a_server_that_refuses_is_named_without_the_password() -> None:
    with pytest.raises(DataError, match="^upload is ftp://me@127.0.0.1:1/x: Connection refused$"):
        Upload("ftp://me:secret@127.0.0.1:1/x")


class Hasty(LocalFileSystem):
    """Ends its connection after a file, as a server of FTP does after a while; fsspec does not keep it."""

    protocol, cachable, used = "hasty", False, False

    def put_file(self, path1: str, path2: str, callback: Any = None, **more: Any) -> None:
        if self.used:
            raise PermissionError("421 idle for too long")
        self.used = True
        super().put_file(path1, path2, **more)


def test_a_connection_that_has_ended_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads.fsspec.core, "url_to_fs", lambda address: (Hasty(), str(tmp_path)))
    upload = Upload("hasty://x")
    upload.check_writable()
    for name in ("a", "b"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"whole")
        upload.send(tmp_path / "out" / name)
        assert (tmp_path / name).read_bytes() == b"whole"


def test_a_folder_keeps_its_address(tmp_path: Path, videos: Path, bucket: str) -> None:
    words = [f"source={videos}", f"out={tmp_path / 'out'}", *FAST]
    assert main([*words, f"upload={bucket}/kept"]) == 0
    assert main([*words, f"upload={bucket}/kept/"]) == 0
    with pytest.raises(DataError, match=rf"was begun with upload={bucket}/kept \(asked: None\)"):
        main(words)


def test_a_store_that_refuses_keeps_what_is_recorded(
    tmp_path: Path, videos: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{bucket}/refused"
    words = [f"source={videos}", f"out={tmp_path / 'out'}", *FAST, SMALL, f"upload={address}"]
    put = s3fs.S3FileSystem._put_file  # what its public put_file runs

    async def refuses(self: Any, file: str, target: str, **more: Any) -> None:
        if target.endswith("00002.tar"):
            raise PermissionError("Access Denied")
        await put(self, file, target, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", refuses)
    s3fs.S3FileSystem.clear_instance_cache()  # an instance binds its methods when it is made
    with pytest.raises(OSError, match=rf"{address}/shard-000-00002.tar: cannot be written \(Access Denied\)"):
        main(words)
    assert len(read_records(tmp_path / "out").shards) == 2
    monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", put)
    s3fs.S3FileSystem.clear_instance_cache()
    assert main(words) == 0
    assert len(list(read_samples(address))) == sum(LENGTHS.values())
