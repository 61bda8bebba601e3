"""Other captions for shards that are there: text is encoded again, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data import recaption
from data.check import check
from data.encoders import load_encoder
from data.encoders.base import EncoderSettings
from data.io.locks import Lock, take
from data.prepare.__main__ import main as prepare
from data.shards.manifest import Manifest
from data.shards.stream import read_samples
from tests.helpers.prepared import FAST, write_clips
from tests.helpers.tiny_models import save_wan
from tests.helpers.videos import numbered, write_video


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """videos/, weights/ and shards/: five clips of three videos, in several tars, made for image-to-video."""
    root = tmp_path_factory.mktemp("recaption")
    for number, length in enumerate((20, 10, 20)):
        write_clips(root / "videos", number, length)
    save_wan(root / "weights", image=True)
    words = ["model=wan", "frames=9", "size=32x48", "workers=1", "cuts=keep", "shard_gb=0.00002", "--image-to-video"]
    prepare([f"source={root}/videos", f"out={root}/shards", f"weights={root}/weights", *words])
    assert len(Manifest.load(root / "shards").shards) > 1
    return root


def run(made: Path, out: Path, captions: Path, *more: str) -> int | None:
    return recaption.main(
        [str(made / "shards"), f"captions={captions}", f"out={out}", f"weights={made}/weights", *more]
    )


def table(path: Path, rows: dict[str, str]) -> Path:
    path.write_text(
        "".join(json.dumps({"video": name, "text": text}) + "\n" for name, text in rows.items()), encoding="utf-8"
    )
    return path


NEW = {f"v{number}.mp4": f"another caption, {number}" for number in range(3)}


@pytest.mark.slow
def test_text_is_new_and_video_the_same(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(made, out, table(tmp_path / "new.jsonl", NEW)) == 0
    old, new = Manifest.load(made / "shards"), Manifest.load(out)
    assert not check(new).problems and new.encoder == old.encoder
    assert [shard.file for shard in new.shards] == [shard.file for shard in old.shards]
    folder = made / "weights"
    encoder = load_encoder("wan", EncoderSettings(folder, torch.device("cpu"), torch.float32, torch.bfloat16))
    for before, after in zip(read_samples(old), read_samples(new), strict=True):
        assert after.caption == NEW[after.meta["source"]] and after.key == before.key
        assert torch.equal(after.latent.view(torch.uint8), before.latent.view(torch.uint8))
        assert after.image.keys() == before.image.keys() == {"condition", "clip"}
        assert all(torch.equal(after.image[name], before.image[name]) for name in after.image)
        assert torch.equal(after.text["text"].tokens, encoder.prompt(after.caption).text["text"].tokens)
        assert {**after.meta, "caption": ""} == {**before.meta, "caption": ""}
    empty = [(folder / "empty_prompt.safetensors").read_bytes() for folder in (out, made / "shards")]
    assert empty[0] == empty[1]
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


@pytest.mark.slow
def test_the_same_captions_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    assert run(made, tmp_path / "out", made / "videos") == 0
    for path in (made / "shards").glob("shard-*.tar"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert Manifest.load(tmp_path / "out").shards == Manifest.load(made / "shards").shards


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, new = tmp_path / "out", table(tmp_path / "new.jsonl", NEW)
    whole = tmp_path / "whole"
    assert run(made, whole, new) == 0
    encode, count = recaption.Work.shard, 0

    def stopped(self: Any, number: int, first: int) -> Any:
        nonlocal count
        if number == 1:
            raise KeyboardInterrupt
        count += 1
        return encode(self, number, first)

    monkeypatch.setattr(recaption.Work, "shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(made, out, new)
    assert not (out / "manifest.json").exists() and count == 1
    other = table(tmp_path / "other.jsonl", dict.fromkeys(NEW, "other"))
    with pytest.raises(recaption.DataError, match="was begun with other shards, captions or weights"):
        run(made, out, other)
    monkeypatch.setattr(recaption.Work, "shard", encode)
    assert run(made, out, new) == 0
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert run(made, out, new) == 0 and "already there" in capsys.readouterr().out
    with pytest.raises(recaption.DataError, match="is finished, with other shards or captions"):
        run(made, out, other)


@pytest.mark.slow
def test_what_cannot_be_is_one_line(made: Path, tmp_path: Path) -> None:
    few = table(tmp_path / "few.jsonl", {"v0.mp4": "only this"})
    with pytest.raises(recaption.DataError, match=r"has no caption for 2 of the videos in .*, such as v1\.mp4"):
        run(made, tmp_path / "out", few)
    assert not (tmp_path / "out").exists()
    assert run(made, tmp_path / "out", few, "missing=keep") == 0
    captions = {s.meta["source"]: s.caption for s in read_samples(tmp_path / "out")}
    assert captions == {"v0.mp4": "only this", "v1.mp4": "clip of video 1", "v2.mp4": "clip of video 2"}
    save_wan(tmp_path / "weights", seed=1, image=True)
    with pytest.raises(recaption.DataError, match="video would have to be encoded again"):
        recaption.main([str(made / "shards"), f"captions={few}", f"out={tmp_path}/b", f"weights={tmp_path}/weights"])
    with pytest.raises(recaption.DataError, match="the folder of the shards; choose another"):
        run(made, made / "shards", few)


def test_data_prepare_appends_to_the_new_folder(tmp_path: Path) -> None:
    """Captions were corrected beside the videos: the folder that has them takes further videos."""
    videos = write_clips(tmp_path / "videos", 0, 10).parent
    prepare([f"source={videos}", f"out={tmp_path}/old", *FAST])
    (videos / "v0.txt").write_text("corrected", encoding="utf-8")
    assert recaption.main([f"{tmp_path}/old", f"captions={videos}"]) == 0
    write_clips(tmp_path / "videos", 1, 10)
    new = tmp_path / "old-recaptioned"
    assert not prepare([f"source={videos}", f"out={new}", *FAST])
    assert [sample.caption for sample in read_samples(new)] == ["corrected", "clip of video 1"]


def test_a_video_without_clips_does_not_keep_the_new_folder_from_growing(tmp_path: Path) -> None:
    videos, words = write_clips(tmp_path / "videos", 0, 10).parent, [*FAST, "min_motion=0.3"]
    write_video(videos / "v1.mp4", 10, picture=lambda _: numbered(170), caption="it stands still")
    assert prepare([f"source={videos}", f"out={tmp_path}/old", *words]) == 0
    for number in (0, 1):
        (videos / f"v{number}.txt").write_text(f"corrected {number}", encoding="utf-8")
    assert recaption.main([f"{tmp_path}/old", f"captions={videos}"]) == 0
    write_clips(videos, 2, 10)
    new = tmp_path / "old-recaptioned"
    assert prepare([f"source={videos}", f"out={new}", *words]) == 0
    assert [sample.caption for sample in read_samples(new)] == ["corrected 0", "clip of video 2"]


def test_what_is_appended_does_not_go_where_the_old_shards_were_moved_to(tmp_path: Path) -> None:
    videos = write_clips(tmp_path / "videos", 0, 10).parent
    there, new = tmp_path / "there", tmp_path / "there-recaptioned"
    assert prepare([f"source={videos}", f"out={tmp_path}/out", f"upload={there}", *FAST]) == 0
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    (videos / "v0.txt").write_text("corrected", encoding="utf-8")
    assert recaption.main([str(there), f"captions={videos}"]) == 0
    write_clips(videos, 1, 10)
    with pytest.raises(recaption.DataError, match=r"was begun with upload=None \(asked: .*there\)"):
        prepare([f"source={videos}", f"out={new}", f"upload={there}", *FAST])
    assert prepare([f"source={videos}", f"out={new}", *FAST]) == 0
    assert [sample.caption for sample in read_samples(new)] == ["corrected", "clip of video 1"]
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before


def test_pieces_are_found_by_columns_of_other_names(tmp_path: Path) -> None:
    videos, table = write_clips(tmp_path / "videos", 0, 40).parent, tmp_path / "list.csv"
    columns = ["start_column=from", "end_column=to"]
    table.write_text("path,text,from,to\nv0.mp4,old,0,1\nv0.mp4,older,1,2\n", encoding="utf-8")
    assert prepare([f"source={table}", f"videos={videos}", f"out={tmp_path}/old", *FAST, *columns]) == 0
    table.write_text("path,text,from,to\nv0.mp4,new,0:00,0:01\nv0.mp4,newer,0:01,0:02\n", encoding="utf-8")
    assert recaption.main([f"{tmp_path}/old", f"captions={table}", *columns]) == 0
    assert [sample.caption for sample in read_samples(tmp_path / "old-recaptioned")] == ["new", "newer"]


def test_ranks_share_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        videos = write_clips(tmp_path / "videos", number, 20).parent
    prepare([f"source={videos}", f"out={tmp_path}/old", *FAST, "shard_gb=0.00002"])
    shards = [shard.file for shard in Manifest.load(tmp_path / "old").shards]
    assert len(shards) > 2
    new = table(tmp_path / "new.jsonl", NEW)

    def run_into(out: str) -> int | None:
        return recaption.main([f"{tmp_path}/old", f"captions={new}", f"out={tmp_path}/{out}"])

    assert run_into("whole") == 0
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert run_into("out") == 0
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.tar")} == set(shards[1::2]) and not (out / "manifest.json").exists()
    assert f"rank 1 is done, {len(shards[::2])} shards are left to the others" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    with (out / recaption.JOURNAL / f"{shards[0]}.lock").open("a", encoding="utf-8") as lock:
        assert take(lock) is Lock.OURS
        with pytest.raises(recaption.DataError, match="out: another data.recaption is writing it"):
            run_into("out")
    assert run_into("out") == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    monkeypatch.setenv("RANK", "1")
    assert run_into("out") == 0 and "already there" in capsys.readouterr().out
