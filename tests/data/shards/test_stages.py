"""A user's own stages stand in the stream: what they change, what they leave exact, and what is refused."""

from __future__ import annotations

import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds

from data.errors import DataError
from data.shards.manifest import Manifest
from data.shards.sample import Sample
from data.shards.stages import Stage, load_stages
from data.shards.stream import LatentStream, read_samples
from tests.helpers.batches import assert_equal, order_of
from tests.helpers.damage import DAMAGE, skipped

CODE = """
from dataclasses import replace
from data.shards.sample import Sample, TextTokens

def halved(sample: Sample) -> Sample:
    return replace(sample, latent=sample.latent / 2)

def shifted(sample):
    text = {name: TextTokens(text.tokens + 1, text.mask) for name, text in sample.text.items()}
    return replace(sample, latent=sample.latent + 1, text=text)

def failing(sample):
    if sample.key == "s007":
        raise RuntimeError("no such colour")
    return sample

NUMBER = 3
"""


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module, importable while the test runs."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "stages_of_a_user.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "code" / "broken_of_a_user.py").write_text("import no_such_module\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "stages_of_a_user", raising=False)
    return "stages_of_a_user"


@pytest.mark.parametrize("workers", [0, 2])
def test_stages_change_samples_and_nothing_else(manifest: Manifest, named: str, workers: int) -> None:
    """In the order that they are named; 11 steps are almost two epochs, and a resumed stream is the tail."""
    plain = list(LatentStream(manifest, order_of(manifest), num_steps=11))
    stages = load_stages([f"{named}.halved", f"{named}.shifted"])
    found = list(LatentStream(manifest, order_of(manifest), num_steps=11, stages=stages, workers=workers))
    assert [(batch.step, batch.keys) for batch in found] == [(batch.step, batch.keys) for batch in plain]
    for batch, before in zip(found, plain, strict=True):
        assert torch.equal(batch.latent, before.latent / 2 + 1)
        mask = before.text["umt5"].mask
        assert torch.equal(batch.text["umt5"].tokens[mask], before.text["umt5"].tokens[mask] + 1)
    resumed = LatentStream(manifest, order_of(manifest), start_step=5, num_steps=6, stages=stages, workers=workers)
    assert_equal(list(resumed), found[5:])


def test_stages_run_in_the_loaders_threads(manifest: Manifest) -> None:
    threads: set[threading.Thread] = set()

    def watch(sample: Sample) -> Sample:
        threads.add(threading.current_thread())
        return sample

    stream = LatentStream(manifest, order_of(manifest), num_steps=6, stages=[Stage("watch", watch)], workers=2)
    assert len(list(stream)) == 6
    assert len(threads) == 2 and all(thread.name.startswith("loader") for thread in threads)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_counted_and_replaced_before_the_stages(
    manifest: Manifest, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, bad = DAMAGE["whole"]
    spoil(manifest)
    seen: list[str] = []

    def note(sample: Sample) -> Sample:
        seen.append(sample.key)
        return sample

    stages = [Stage("note", note)]
    plain = list(LatentStream(manifest, order_of(manifest), num_steps=12))
    caplog.clear()
    found = list(LatentStream(manifest, order_of(manifest), num_steps=12, stages=stages, workers=workers))
    assert_equal(found, plain)
    assert sorted(skipped(caplog)) == bad and len(seen) == 48 and not set(seen) & set(bad)
    with pytest.raises(DataError, match="5 damaged samples, at most 4"):
        list(LatentStream(manifest, order_of(manifest), num_steps=12, stages=stages, workers=workers, max_bad=4))


def test_a_stage_stands_in_a_pipeline_of_webdatasets(manifest: Manifest, named: str) -> None:
    (halved,) = load_stages([f"{named}.halved"])
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(list(manifest.urls)), wds.tarfile_to_samples(), wds.map(Sample.from_entry), wds.map(halved)
    )
    found = list(pipeline)
    assert len(found) == 23
    for sample, expected in zip(found, read_samples(manifest, stages=[halved]), strict=True):
        assert sample.key == expected.key and torch.equal(sample.latent, expected.latent)


def test_a_stage_that_raises_is_named_with_its_sample_and_its_line(manifest: Manifest, named: str) -> None:
    stages = load_stages([f"{named}.halved", f"{named}.failing"])
    line = CODE.split("\n").index('        raise RuntimeError("no such colour")') + 1
    message = (
        f"data.stages: {named}.failing of sample s007: raised RuntimeError: no such colour "
        f"({named}.py, line {line}); correct the stage"
    )
    for workers in (0, 2):
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            list(LatentStream(manifest, order_of(manifest), num_steps=11, stages=stages, workers=workers))


def _nan(sample: Sample) -> Sample:
    return replace(sample, latent=sample.latent * float("nan"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda sample: None, "returned NoneType, expected a data.shards.sample.Sample"),
        (lambda sample: {"__key__": sample.key}, "returned dict, expected a data.shards.sample.Sample"),
        (lambda sample: replace(sample, key="another"), "changed the key to 'another', expected the same key"),
        (lambda sample: replace(sample, latent=sample.latent[:, :2]),
         r"changed the latent's shape from \[4, 3, 2, 2\] to \[4, 2, 2, 2\]"),
        (lambda sample: replace(sample, latent=sample.latent.double()), "sample s000: latent is torch.float64"),
        (_nan, "sample s000: latent holds NaN"),
        (lambda sample: replace(sample, text={"umt5": sample.text["umt5"].tokens}), "returned what is no valid sample"),
        (lambda sample: replace(sample, latent=None), "returned what is no valid sample"),
        (lambda sample: replace(sample, meta={}), "meta.caption is None"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_schema_is_refused(make_sample: Any, function: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^data.stages: mine.change of sample s000: .*{message}") as caught:
        Stage("mine.change", function)(make_sample(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("halved", "is not the name of a function in a module"),
        ("{}.halved()", "is not the name of a function in a module"),
        ("no_such_module_of_a_user.f", r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_module"),
        ("broken_of_a_user.f", r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_module'\)"),
        ("{}.doubled", "{} has no such function"),
        ("{}.NUMBER", "{} NUMBER is a int, not a function"),
    ],
)
def test_a_stage_that_cannot_be_loaded_is_one_line(named: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message.format(named)) as caught:
        load_stages([name.format(named)])
    assert str(caught.value).startswith(f"data.stages: {name.format(named)}: ") and "\n" not in str(caught.value)
