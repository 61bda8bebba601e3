"""Files of the library are whole or not there."""

import errno
import os

import numpy
import pytest

from radial.__main__ import main
from radial.whole import written


def test_what_fails_while_it_is_written_leaves_the_old_file(tmp_path):
    file = tmp_path / "mask.png"
    with written(file) as fresh:
        fresh.write_bytes(b"old")
        assert fresh.suffix == ".png" and not file.exists()
    with pytest.raises(OSError, match="full"), written(file) as fresh:
        fresh.write_bytes(b"ne")
        raise OSError("full")
    assert file.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["mask.png"]


def test_a_failed_write_names_the_file_that_was_asked_for(tmp_path, monkeypatch, capsys):
    """Of a full disk, whose error names none, and of a name that a folder has; a mask that was there stays."""

    def full(file, **arrays):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mask, picture = tmp_path / "mask.npz", tmp_path / "mask.png"
    mask.write_bytes(b"old")
    picture.mkdir()
    monkeypatch.setattr(numpy, "savez_compressed", full)
    for setting, file, reason in (("save", mask, "No space left on device"), ("plot", picture, "Is a directory")):
        with pytest.raises(SystemExit) as stop:
            main.run(["mask", "frames=3", "tokens_per_frame=64", f"{setting}={file}"])
        assert stop.value.code == 2 and capsys.readouterr().err == f"error: cannot write {file}: {reason}\n"
    assert mask.read_bytes() == b"old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mask.npz", "mask.png"]
