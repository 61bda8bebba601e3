"""Parts of folders, several folders as one, and the split by video."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.shards.manifest import Manifest
from data.shards.order import BatchOrder
from data.shards.origins import held_out, key_of, sources_of
from data.shards.shard_info import SampleInfo, ShardInfo
from data.shards.stream import LatentStream, read_samples
from data.shards.views import cut, joined, only


def test_a_cut_sample_is_the_beginning_of_the_stored_one(make_folder: Callable[..., Manifest]) -> None:
    whole = make_folder(6, frames=lambda i: 3 + i % 3)
    view = cut(whole, 4)
    assert Counter(sample.shape[1] for sample in view.samples) == {3: 2, 4: 4}
    for before, after in zip(read_samples(whole), read_samples(view), strict=True):
        assert torch.equal(after.latent, before.latent[:, :4]) and after.latent.is_contiguous()
        assert torch.equal(after.image["first"], before.image["first"])
        assert after.meta == before.meta
    assert [sample.stored for sample in Manifest.load(whole.folder).samples] == [None] * 6


def test_a_condition_of_all_frames_is_cut_with_the_latent(make_sample: Callable[..., object]) -> None:
    sample = make_sample(0, 5)
    condition = torch.randn(8, 5, 2, 2)
    found = replace(sample, image={"condition": condition, "clip": torch.ones(5, 7)}).first_frames(2)  # type: ignore
    assert torch.equal(found.image["condition"], condition[:, :2])
    assert found.image["clip"].shape == (5, 7)


def test_folders_are_read_as_one(make_folder: Callable[..., Manifest]) -> None:
    one, other = make_folder(7, "one"), make_folder(4, "other", frames=lambda i: 5)
    both = joined([one, other], [1, 2])
    keys = [sample.key for sample in read_samples(both)]
    assert keys == [sample.key for manifest in (one, other) for sample in manifest.samples]
    assert both.weights == (1, 1, 2)
    order = BatchOrder(both.shapes(), seed=0, global_batch=1, shuffle_window=4, weights=both.weights)
    batches = list(LatentStream(both, order, num_steps=15))
    assert Counter((batch.latent.shape[2], batch.keys[0]) for batch in batches) == Counter(
        {(3, f"s{i:03d}"): 1 for i in range(7)} | {(5, f"s{i:03d}"): 2 for i in range(4)}
    )
    with pytest.raises(DataError, match="other: was made with test-v1, .*one with test-v2; shards that are mixed"):
        joined([replace(one, encoder="test-v2"), other])
    with pytest.raises(DataError, match="other: has 16 frames a second, .*one 24"):
        joined([replace(one, fps=24.0), other])


def test_a_part_is_read_where_it_lies(make_folder: Callable[..., Manifest]) -> None:
    whole = make_folder(11)
    part = only(whole, {1, 8, 10})
    assert [sample.key for sample in read_samples(part)] == ["s001", "s008", "s010"]
    assert [shard.file for shard in part.shards] == ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]
    with pytest.raises(DataError, match="no sample is left"):
        only(whole, set())


def listed(monkeypatch: pytest.MonkeyPatch, rows: dict[str, list[str]]) -> Callable[[str, list[int]], Manifest]:
    """Manifests without files: `rows` are the paths of each home's videos; `make(home, clips of each row)`."""
    monkeypatch.setattr("data.shards.origins.sources_of", lambda m: [rows[m.home][int(s.key[1:8])] for s in m.samples])

    def make(home: str, clips: list[int]) -> Manifest:
        keys = [key_of(row, clip) for row, count in enumerate(clips) for clip in range(count)]
        samples = tuple(SampleInfo(key, (4, 3, 2, 2), 0, 1) for key in keys)
        return Manifest((ShardInfo("a.tar", samples, 1, ""),), 16.0, "e", "", "", {}, home=home)

    return make


def path_of(row: int) -> str:
    return f"{row // 2}.mp4"  # two rows are pieces of one video


@given(
    st.lists(st.integers(0, 3), min_size=60, max_size=90), st.integers(0, 30),
    st.one_of(st.integers(1, 9), st.sampled_from([0.1, 0.3])),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_video_is_on_one_side_and_stays_there(clips: list[int], more: int, amount: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        make = listed(patch, {name: [path_of(row) for row in range(200)] for name in "ab"})
        folders = [make("a", clips), make("b", clips[: len(clips) // 2])]
        appended = [make("a", clips + [2] * more), folders[1]]
        try:
            before = held_out(folders, amount)
        except DataError as error:
            assert amount >= 1 and "cannot be held out" in str(error)
            return
        after = held_out(appended, amount)
    videos: dict[str, set[bool]] = {}
    for folder, numbers in zip(folders, before, strict=True):
        for number, sample in enumerate(folder.samples):
            videos.setdefault(path_of(int(sample.key[1:8])), set()).add(number in numbers)
    assert all(len(sides) == 1 for sides in videos.values())
    assert amount < 1 or sum(map(len, before)) >= amount
    assert {n for n in after[0] if n < len(folders[0].samples)} == before[0] and after[1] == before[1]


def test_what_nothing_names_is_not_split(make_folder: Callable[..., Manifest], tmp_path: Path) -> None:
    folder = make_folder(3)
    with pytest.raises(DataError, match=r"nothing tells which video each sample is from, expected videos\.json"):
        sources_of(folder)
    (folder.folder / "videos.json").write_text('{"rows": [{"path": "a.mp4"}]}', encoding="utf-8")
    with pytest.raises(DataError, match=r"videos\.json: does not list the videos of the samples"):
        sources_of(folder)
