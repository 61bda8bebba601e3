"""The sbatch script of a run or a sweep: a head of its own, then the rest of ``template.sbatch``, the same for all."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MARK = "# ---- the run"  # the template from here on is the same for every run


@dataclass(frozen=True)
class Job:
    """What stands in the head of the script."""

    name: str
    folder: Path  # of the run; with an array, of the sweep
    nodes: int
    tasks: int  # processes a node
    gpus: int  # of each node, 0 on a cluster without
    cpus: int  # cores a process
    grace: int  # seconds
    array: str | None = None  # the numbers of a sweep's runs, as sbatch's --array
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    memory: str | None = None
    container: str | None = None
    mounts: Sequence[str | Path] = ()  # what the container needs beside the current folder
    modules: Sequence[str] = ()
    sbatch: Sequence[str] = ()

    def script(self) -> str:
        """The whole sbatch file."""
        options = {
            "job-name": self.name,
            "array": self.array,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks,
            "gpus-per-node": self.gpus or None,
            "cpus-per-task": self.cpus,
            "mem": self.memory,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "signal": f"USR1@{self.grace}",
            "requeue": "",
            "open-mode": "append",
            "chdir": Path.cwd(),
            # in this option alone SLURM replaces what follows a %
            "output": str(self.folder).replace("%", "%%") + ("/%a/slurm-%A_%a.out" if self.array else "/slurm-%j.out"),
        }
        why = {
            "array": "one task a run",
            "ntasks-per-node": "one a GPU" if self.gpus else "one a process",
            "signal": "seconds before the time is up, every rank gets the signal to checkpoint",
            "requeue": "a node that dies, or a preemption, puts the job back into the queue",
            "open-mode": "and its output goes on in the same file",
        }
        words = " ".join(shlex.join(sys.argv[2:]).splitlines())  # a line of its own would be run, and end the options
        head = ["#!/bin/bash", f"# Written by: python -m launch slurm {words}"]
        for key, value in options.items():
            if value is not None:
                word = f"--{key}={value}" if value != "" else f"--{key}"
                line = f"#SBATCH {_as_sbatch_reads(word)}"
                head.append(f"{line:<40}  # {why[key]}" if key in why else line)
        head += [f"#SBATCH {_as_sbatch_reads(word)}" for word in self.sbatch]
        prefix, srun = self._container()
        head += [
            f"RUN={shlex.quote(str(self.folder))}{'/$SLURM_ARRAY_TASK_ID' if self.array else ''}",
            f"PYTHON={shlex.quote('python' if self.container else sys.executable)}",
            f"CONTAINER=({shlex.join(prefix)})",
            f"SRUN=({shlex.join(srun)})",
        ]
        if self.modules:
            load = f"module load {shlex.join(self.modules)}"
            head += [
                "type module > /dev/null 2>&1 || . /etc/profile",  # which a job's shell does not always read
                f"{load} || {{ echo {shlex.quote(f'{load} failed')}; exit 2; }}",
            ]
        template = Path(__file__).with_name("template.sbatch").read_text(encoding="utf-8")
        return "\n".join(head) + "\n\n" + template[template.index(_MARK) :]

    def _container(self) -> tuple[list[str], list[str]]:
        """What stands before the command, and options of srun."""
        if self.container is None:
            return [], []
        bound = ",".join(f"{each}:{each}" for each in dict.fromkeys(map(str, (Path.cwd(), *self.mounts))))
        if self.container.endswith(".sif"):
            return ["apptainer", "exec", "--nv", "--bind", bound, "--pwd", str(Path.cwd()), self.container], []
        workdir = f"--container-workdir={Path.cwd()}"
        return [], [f"--container-image={self.container}", f"--container-mounts={bound}", workdir]


def _as_sbatch_reads(word: str) -> str:
    """An option with its value in quotes where it needs them: ``--comment=a b`` as ``--comment="a b"``; a word that is
    no option, such as the value after ``--comment``, as a whole."""
    name, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if not re.search(r"""[\s#"'\\]""", value):
        return word
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'{name}{equals}"{escaped}"'
