"""A sweep's folder, its runs as processes of their own, and how it goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.tiny import settings, words
from train.errors import UserError
from train.storage.run_folder import get_state, set_state
from train.storage.sweep_folder import OUTPUT, SweepFolder
from train.sweep.command import prepare
from train.sweep.local import LocalRuns

# stands for python -m train: it notes that it was started, then does what its run's seed asks for
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1].removeprefix("resume="))
seed = int(next(l for l in (folder / "config.yaml").read_text().splitlines() if l.startswith("seed:")).split()[1])
(folder / "started").write_text((folder / "started").read_text() + "x" if (folder / "started").exists() else "x")
if (folder / "mended").exists():
    seed = 0
if seed == 1:
    print("error: model.path is nowhere\\nwandb: a last word", flush=True)
    sys.exit(2)
if seed == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 3:
    def stop(number, _):
        (folder / "state").write_text("requeue\\nby " + signal.Signals(number).name)
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").write_text("")
    time.sleep(60)
(folder / "state").write_text("done\\n")
"""


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM, encoding="utf-8")
    return [sys.executable, str(file)]


def sweep_of(tmp_path, **changes):
    return prepare(settings(tmp_path, **changes), lambda config: None)


def starts(sweep):
    return [len((sweep.run(n) / "started").read_text(encoding="utf-8")) if (sweep.run(n) / "started").exists() else 0
            for n in range(len(sweep.settings))]  # fmt: skip


def test_the_folder_has_a_run_folder_for_each(tmp_path):
    sweep = sweep_of(tmp_path, lora__rank="4,8", seed="0,1")
    assert sweep.path.parent == tmp_path / "runs" / "shapes_4x"
    assert [sweep.label(n) for n in range(4)] == [f"lora.rank={r} seed={s}" for r in (4, 8) for s in (0, 1)]
    assert "  rank: 8\n" in (sweep.run(2) / "config.yaml").read_text(encoding="utf-8")
    assert SweepFolder.read(sweep.path) == sweep and sweep.unfinished() == [0, 1, 2, 3]
    set_state(sweep.run(1), "done")
    assert sweep.unfinished() == [0, 2, 3]


def test_a_run_that_fails_or_is_killed_ends_alone(tmp_path, program, capsys):
    sweep = sweep_of(tmp_path, seed="range(3)", trainer__steps="4,5")
    runs = LocalRuns(sweep, program)
    runs.run()
    assert (runs.failed, runs.asked, starts(sweep)) == ([1, 2, 4, 5], 0, [1] * 6)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("0  trainer.steps=4 seed=0  done in 0.0 min, no step yet")
    assert f"failed, exit code 2: model.path is nowhere ({sweep.run(1) / OUTPUT})" in lines[1]
    assert "failed, ended by SIGKILL: nothing was printed" in lines[2]
    assert get_state(sweep.run(1)) == ("failed", "exit code 2: model.path is nowhere")
    assert get_state(sweep.run(2)) == ("failed", "ended by SIGKILL: nothing was printed")
    for number in (1, 2, 4, 5):
        (sweep.run(number) / "mended").touch()
    again = LocalRuns(SweepFolder.read(sweep.path), program)
    again.run()
    assert (again.failed, starts(sweep)) == ([], [1, 2, 2, 1, 2, 2])
    assert "0  trainer.steps=4 seed=0  was done before, no step yet" in capsys.readouterr().out


def test_a_signal_is_passed_on_and_stops_the_sweep(tmp_path, program, capsys):
    sweep = sweep_of(tmp_path, seed="0,3,4")
    child = os.fork()
    if not child:  # it signals the sweep as soon as its second run listens
        while not (sweep.run(1) / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    before = signal.getsignal(signal.SIGTERM)
    runs = LocalRuns(sweep, program)
    runs.run()
    os.waitpid(child, 0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (runs.failed, runs.asked, starts(sweep)) == ([], 2, [1, 1, 0])
    assert get_state(sweep.run(1)) == ("requeue", "by SIGTERM")
    assert capsys.readouterr().out.splitlines()[-1].endswith("stopped: by SIGTERM")


def test_a_run_that_a_signal_ends_before_it_listens_is_stopped_and_not_failed(tmp_path, program, capsys):
    sweep = sweep_of(tmp_path, seed="2,0")
    runs = LocalRuns(sweep, program)
    runs.asked = 2
    runs.run()
    assert starts(sweep) == [0, 0]
    program[1:] = ["-c", "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"]
    runs = LocalRuns(sweep, program)
    runs.run()
    assert (runs.failed, runs.asked) == ([], 2)
    assert capsys.readouterr().out == "0  seed=2  stopped, ended by SIGTERM\n"


def test_the_same_command_goes_on_and_more_values_are_more_runs(tmp_path):
    sweep = sweep_of(tmp_path, seed="0,1")
    assert sweep_of(tmp_path, seed="0,1", resume=sweep.path) == sweep
    assert prepare({"resume": str(sweep.path)}, lambda config: None) == sweep
    longer = sweep_of(tmp_path, seed="0,1,7", resume=sweep.path)
    assert [one["seed"] for one in longer.settings] == ["0", "1", "7"] and (longer.run(2) / "config.yaml").is_file()
    with pytest.raises(UserError, match="has no run of these settings, expected those that it was started with"):
        sweep_of(tmp_path, seed="8,9", resume=sweep.path)
    assert SweepFolder.read(sweep.path) == longer


@pytest.mark.slow
def test_a_sweep_of_real_runs_stops_and_goes_on_where_it_stopped(tmp_path):
    """Two seeds of two ranks; one run fails, the sweep is asked to stop in the second, then it goes on to its end."""
    given = words(tmp_path, lora__rank="4,8", seed="0,1", trainer__steps=12, trainer__checkpoint_every=3)
    command = [sys.executable, "-m", "train", "-m", *given]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    end = time.monotonic() + 400
    while not list(tmp_path.glob("runs/shapes_4x/*/1/checkpoints/step-*")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 75, out + error
    (path,) = (tmp_path / "runs" / "shapes_4x").iterdir()
    assert f"stopped; python -m train -m resume={path} goes on" in out
    sweep = SweepFolder.read(path)
    assert sweep.unfinished() == [1, 2, 3] and get_state(sweep.run(1))[0] == "requeue"
    broken = sweep.run(2) / "config.yaml"
    text = broken.read_text(encoding="utf-8")
    broken.write_text(text.replace(str(tmp_path / "model"), str(tmp_path / "nowhere")), encoding="utf-8")
    done = subprocess.run([*command, f"resume={path}"], capture_output=True, encoding="utf-8")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "0  lora.rank=4 seed=0  was done before, training loss " in done.stdout
    assert "\n2  lora.rank=8 seed=0  failed, exit code 2: model.path" in done.stdout
    assert "\n3  lora.rank=8 seed=1  done in " in done.stdout and "1 of 4 runs not finished: 2; " in done.stdout
    assert "lora.rank=4     2 of 2  " in done.stdout and "lora.rank=8     1 of 2  " in done.stdout
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "nowhere" not in json.dumps(sweep.settings) and page.count("<svg") >= 3
    assert Path(sweep.run(3) / "export").is_dir()
