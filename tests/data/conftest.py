"""Small real folders of shards for the tests of data/."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from data.io import retry as patience
from data.shards.manifest import Manifest
from data.shards.sample import Prompt, Sample, TextTokens
from data.shards.writer import ShardWriter
from tests.helpers.prepared import write_six
from tests.helpers.servers import HOW, MOTO, Server, http_server, s3_server

MakeSample = Callable[..., Sample]
MakeFolder = Callable[..., Manifest]


def _sample(index: int, frames: int = 3) -> Sample:
    noise = torch.Generator().manual_seed(index)
    length = 2 + index % 3
    return Sample(
        key=f"s{index:03d}",
        latent=torch.randn(4, frames, 2, 2, generator=noise).to(torch.bfloat16),
        text={"umt5": TextTokens(torch.randn(length, 6, generator=noise), torch.ones(length, dtype=torch.bool))},
        pooled={"clip": torch.randn(5, generator=noise)},
        image={"first": torch.randn(4, 2, 2, generator=noise)},
        meta={"caption": f"clip {index}", "fps": 16.0},
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on shared cores waiting for them takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder of six good videos, see `prepared.write_six`."""
    return write_six(tmp_path / "videos")


@pytest.fixture
def make_sample() -> MakeSample:
    """`make_sample(index, frames=3)`: a valid sample; texts have 2 to 4 tokens."""
    return _sample


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """`make_folder(count, name="shards", per_shard=5, frames=...)`: a finished folder; frames(i) gives each length."""

    def make(
        count: int, name: str = "shards", per_shard: int = 5, frames: Callable[[int], int] = lambda i: 3
    ) -> Manifest:
        empty = Prompt({"umt5": TextTokens(torch.zeros(2, 6), torch.zeros(2, dtype=torch.bool))}, {})
        with ShardWriter(
            tmp_path / name,
            fps=16.0,
            encoder="test-v1",
            latent="noise",
            text="noise",
            arguments={"count": count},
            empty_prompt=empty,
            max_samples=per_shard,
        ) as writer:
            for i in range(count):
                writer.write(_sample(i, frames(i)))
        return Manifest.load(tmp_path / name)

    return make


@pytest.fixture
def manifest(make_folder: MakeFolder) -> Manifest:
    """23 samples of two shapes in 5 shards."""
    made: Manifest = make_folder(23, frames=lambda i: 3 + i % 2)
    return made


@pytest.fixture
def server(manifest: Manifest) -> Iterator[Server]:
    """An HTTP server over the folder of `manifest`."""
    with http_server(manifest.folder) as running:
        yield running


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited before something is tried again; nothing has answered before."""
    waited: list[float] = []
    monkeypatch.setattr(patience, "check_wanted", lambda url, seconds: waited.append(seconds))
    monkeypatch.setattr(patience, "answered", set())
    return waited


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The address of an S3 server."""
    if not (MOTO / "bin" / "moto_server").exists():
        pytest.skip(HOW)
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket on the server, which s3fs finds through the environment as it finds AWS."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install -e '.[dev]'")
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs("videos", exist_ok=True)
    return "s3://videos"
