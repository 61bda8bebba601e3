"""A private SLURM for the tests of this folder; they skip with the reason where none can be started."""

from collections.abc import Iterator

import pytest

from tests.helpers.slurm import Slurm, missing


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes on this machine, n1 and n2."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
