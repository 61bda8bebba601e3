"""What cannot be written to standard output is dropped, and the command does its work."""

import os
import pty
import subprocess
import sys

import pytest

PROGRAM = r"""
import pathlib, sys
from radial.cli.command import run
def command(words):
    for line in range(3000):
        print("line", line, "\u4f60\udcff", flush=line % 2 == 0)
        print("warning", line, "\u4f60", file=sys.stderr)
    print("not flushed", end="")
    pathlib.Path(words[0]).write_text(f"{sys.stdout.isatty()} {sys.stderr.errors}", encoding="utf-8")
run(command, lambda words: "")
"""


def ran(tmp_path, stdout, environment=None, **given):
    file = tmp_path / "done"
    done = subprocess.run(
        [sys.executable, *given.pop("options", []), "-c", PROGRAM, str(file)],
        stdout=stdout,
        stderr=given.pop("stderr", stdout),
        env={**os.environ, **(environment or {})},
        **given,
    )
    assert done.returncode == 0, done
    assert file.read_text(encoding="utf-8").startswith("False")
    return done


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("where", ["full disk", "closed terminal", "closed pipe", "pipe that would block"])
def test_output_that_nothing_takes_is_dropped(tmp_path, where, options):
    if where == "full disk":
        reader, writer = os.open(os.devnull, os.O_RDONLY), os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = pty.openpty() if where == "closed terminal" else os.pipe()
    if where == "pipe that would block":
        os.set_blocking(writer, False)
    else:
        os.close(reader)
    ran(tmp_path, writer, options=options)
    if where == "pipe that would block":
        os.close(reader)
    os.close(writer)


def test_a_command_that_is_started_without_output_runs(tmp_path):
    def close():
        os.close(1)
        os.close(2)

    ran(tmp_path, None, stderr=None, preexec_fn=close)


@pytest.mark.parametrize("encoding", ["utf-8", "iso-8859-1"])
def test_what_can_be_written_arrives_in_order_with_what_the_encoding_lacks_spelt_out(tmp_path, encoding):
    environment = {"PYTHONIOENCODING": encoding}
    done = ran(tmp_path, subprocess.PIPE, environment, stderr=subprocess.PIPE)
    sign = "\u4f60" if encoding == "utf-8" else r"\u4f60"
    lines = done.stdout.decode(encoding).split("\n")
    assert lines == [*(f"line {line} {sign}\\udcff" for line in range(3000)), "not flushed"]
    assert done.stderr.decode(encoding) == "".join(f"warning {line} {sign}\n" for line in range(3000))
