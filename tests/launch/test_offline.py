"""A dry run asks nothing over the network."""

import socket

import pytest

from launch.slurm import main
from radial.cli.reader import settings_of
from tests.helpers.tiny import words
from train.config.compose import compose_run, finish
from train.preflight import preflight, remote_shards


@pytest.fixture
def offline(monkeypatch):
    """No connection is tried."""

    def refused(*arguments):
        raise AssertionError(f"the network is asked for {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def far(tmp_path, **more):
    return words(
        tmp_path,
        data__synthetic_clips=0,
        data__shards="http://nobody.invalid/shards",
        validation__every=2,
        validation__shards="s3://nobody/held-out",
        **more,
    )


def test_a_dry_run_needs_no_network(tmp_path, offline, capsys):
    main(["processes=2", "dry_run=true", *far(tmp_path)])
    (folder,) = (tmp_path / "runs" / "shapes_4x").iterdir()
    said = capsys.readouterr().out
    assert "not seen   data.shards http://nobody.invalid/shards: the job looks at it before it starts" in said
    assert "not seen   validation.shards s3://nobody/held-out: the job looks" in said
    assert (folder / "job.sbatch").is_file()
    main([f"resume={folder}", "dry_run=true"])
    assert "not seen   data.shards" in capsys.readouterr().out


def test_all_others_ask(tmp_path, offline):
    config = finish(compose_run(settings_of(far(tmp_path))))
    assert set(remote_shards(config)) == {"data.shards", "validation.shards"}
    with pytest.raises(AssertionError, match="the network is asked"):
        preflight(config)
