"""Writing beside, then renaming: the old, the new or none, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.io.files import beside, write_utf8


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    write_utf8(path, "old")
    with beside(path) as fresh:
        fresh.write_text("né", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
        assert fresh.name.startswith(".f.json.") and fresh.name.endswith(".tmp")
    assert path.read_text(encoding="utf-8") == "né" and names(tmp_path) == ["f.json"]


def test_a_folder_takes_the_place_of_a_full_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for content in ("old", "new"):
        with beside(path) as fresh:
            (fresh / "inner").mkdir(parents=True)
            (fresh / "inner" / content).write_text(content, encoding="utf-8")
            (fresh / "link").symlink_to("/nowhere")
    assert names(path / "inner") == ["new"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_leaves_the_old_one_and_nothing_else(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "out"
    if folder:
        path.mkdir()
    write_utf8(path / "old" if folder else path, "old")
    with pytest.raises(RuntimeError, match="enough"), beside(path) as fresh:
        fresh.mkdir()
        (fresh / "half").write_text("half", encoding="utf-8")
        raise RuntimeError("enough")
    assert names(tmp_path) == ["out"]
    assert (path / "old" if folder else path).read_text(encoding="utf-8") == "old"


def test_a_folder_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    path.mkdir()
    write_utf8(path / "old", "old")

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match="no space left"), beside(path) as fresh:
        fresh.mkdir()
        monkeypatch.setattr(Path, "replace", full)
    assert names(path) == ["old"] and names(tmp_path) == ["out"]


def test_what_cannot_be_synced_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", sync)
    write_utf8(tmp_path / "f", "whole")
    assert (tmp_path / "f").read_text(encoding="utf-8") == "whole"


KILLED = """
import os, signal, sys
from pathlib import Path
from data.io.files import beside
with beside(Path(sys.argv[1])) as fresh:
    fresh.write_text("half", encoding="utf-8")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_is_no_file_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    write_utf8(path, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL and path.read_text(encoding="utf-8") == "old"
    (left,) = set(names(tmp_path)) - {"f.json"}
    assert left.startswith(".") and left.endswith(".tmp")
    write_utf8(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
