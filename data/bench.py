"""How fast the loader is: `python -m data.bench`.

Two questions. Does the loader keep up with the disk: its samples a second against reading the same tars raw, member
after member, with Python's tarfile. And does it stall training: the share of a step that is spent waiting for its
batch, beside a step of a given length. Every figure is of this machine, with the shards in the page cache if they fit.
"""

from __future__ import annotations

import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.errors import explained
from data.io.remote import scheme_of
from data.shards.manifest import Manifest
from data.shards.order import BatchOrder
from data.shards.sample import Prompt, Sample, TextTokens
from data.shards.stream import LatentStream
from data.shards.writer import ShardWriter
from radial.cli.command import Command
from radial.cli.settings import POSITIVE, at_least, setting

ROUNDS = 3
LEAST_OF_RAW = 0.8
MOST_WAITING = 0.01


@dataclass
class Arguments:
    """The keys of the command line."""

    shards: str | None = setting(
        "folder or URL; null: shards of Wan-14B at 4x (41 MB a sample) are made and removed", None, path=True
    )
    samples: int = setting("how many to make when shards is null", 24, must=at_least(1))
    workers: int = setting("the loader's threads", 1, must=at_least(1))
    step_seconds: float = setting(
        "length of the training step that the loader runs beside", 16.0, unit="seconds", must=POSITIVE
    )
    steps: int = setting("how many such steps", 4, must=at_least(1))


@dataclass(frozen=True)
class Speed:
    """Samples and bytes of a second."""

    samples: float
    bytes: float


def raw_speed(files: list[Path], samples: int) -> Speed:
    """Read every member of the tars, which hold so many samples, with Python's tarfile, and nothing more."""
    start, size = time.perf_counter(), 0
    for file in files:
        with tarfile.open(file) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                size += len(content.read())
    seconds = time.perf_counter() - start
    return Speed(samples / seconds, size / seconds)


def loader_speed(shards: str, workers: int, samples: int) -> Speed:
    """Take so many samples, one a batch, after a first one that starts the threads."""
    loader = iter(_loader(shards, workers, samples + 1))
    next(loader)
    start, taken, size = time.perf_counter(), 0, 0
    for batch in loader:
        taken += 1
        size += batch.nbytes
    seconds = time.perf_counter() - start
    return Speed(taken / seconds, size / seconds)


def waiting_share(shards: str, workers: int, steps: int, step_seconds: float) -> float:
    """The share of a step's time that goes into waiting for its batch, the first step's apart."""
    loader = iter(_loader(shards, workers, steps + 1))
    next(loader)
    waited = 0.0
    for _ in range(steps):
        time.sleep(step_seconds)
        start = time.perf_counter()
        next(loader)
        waited += time.perf_counter() - start
    return waited / (waited + steps * step_seconds)


def _loader(shards: str, workers: int, steps: int) -> LatentStream:
    manifest = Manifest.load(shards)
    order = BatchOrder(manifest.shapes(), seed=0, global_batch=1, shuffle_window=256)
    return LatentStream(manifest, order, num_steps=steps, workers=workers)


def make_shards(folder: Path, samples: int) -> None:
    """Shards like those of Wan-14B at 4x and 720p: latents of 321 frames, text of 512 tokens."""
    noise = torch.Generator().manual_seed(0)
    latent = torch.randn(16, 81, 90, 160, generator=noise).to(torch.bfloat16)
    text = TextTokens(torch.randn(512, 4096, generator=noise).to(torch.bfloat16), torch.ones(512, dtype=torch.bool))
    about: dict[str, Any] = {"encoder": "noise", "latent": "noise", "text": "noise", "arguments": {}}
    empty = Prompt({"text": text}, {})
    with ShardWriter(folder, fps=16.0, empty_prompt=empty, max_samples=max(3, samples // 4), **about) as writer:
        for i in tqdm(range(samples), "writing", unit="sample"):
            writer.write(Sample(f"s{i:04d}", latent.roll(i), {"text": text}, {}, {}, {"caption": ""}))


def measure(given: Arguments) -> int:
    """Measure and print."""
    if given.shards is not None:
        return _report(given, given.shards)
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder) / "shards", given.samples)
        return _report(given, f"{folder}/shards")


def _report(given: Arguments, shards: str) -> int:
    manifest = Manifest.load(shards)
    count = len(manifest.samples)
    size = sum(shard.bytes for shard in manifest.shards) / count
    print(f"{count} samples of {size / 1e6:.1f} MB in {len(manifest.shards)} shards, median of {ROUNDS}")
    local = [Path(url) for url in manifest.urls if scheme_of(url) == "file"]
    raw = _median(lambda: raw_speed(local, count)) if len(local) == len(manifest.shards) else None
    loaded = _median(lambda: loader_speed(shards, given.workers, count))
    print(f"{'':<24}{'samples/s':>12}{'GB/s':>8}")
    if raw is not None:
        print(f"{'raw tarfile':<24}{raw.samples:>12.1f}{raw.bytes / 1e9:>8.2f}")
    print(f"{f'loader, {given.workers} workers':<24}{loaded.samples:>12.1f}{loaded.bytes / 1e9:>8.2f}")
    if raw is not None:
        of_raw = loaded.samples / raw.samples
        print(f"loader / raw: {of_raw:.2f} ({_verdict(of_raw >= LEAST_OF_RAW)}: at least {LEAST_OF_RAW:g})")
    share = waiting_share(shards, given.workers, given.steps, given.step_seconds)
    verdict = f"{_verdict(share <= MOST_WAITING)}: at most {MOST_WAITING:.0%}"
    print(f"waiting for data beside steps of {given.step_seconds:g} s: {share:.2%} of the time ({verdict})")
    return 0


def _verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def _median(measure: Callable[[], Speed]) -> Speed:
    found = [measure() for _ in range(ROUNDS)]
    return Speed(statistics.median(s.samples for s in found), statistics.median(s.bytes for s in found))


main = Command(
    "python -m data.bench",
    "Measures the loader: samples/s and GB/s against raw tarfile reading, and the share of a step spent waiting.",
    Arguments,
    measure,
    ["python -m data.bench", "python -m data.bench shards=shards/openvid_4x workers=2 step_seconds=30"],
    explain=explained,
)

if __name__ == "__main__":
    main.run()
