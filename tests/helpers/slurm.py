"""A private SLURM on this machine: its own munge, controller and two slurmd, on free ports, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
# where Debian puts daemons, which is not on every user's path
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONF = """\
ClusterName=radial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
KillWait=30
ReturnToService=2
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n1,n2 MaxTime=10 State=UP
"""


def missing() -> str | None:
    """Why no SLURM can be started here, in words; None where it can."""
    lacking = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (Debian: slurm-wlm and munge)"
    return None if os.geteuid() == 0 else "starting SLURM's daemons needs root"


@dataclass
class Slurm:
    """Two nodes of four CPUs, a partition ``main``. Commands run with `environment`."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        # an address as a user's profile may set it, which a job must not take for its own
        ours = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH, "MASTER_ADDR": "192.0.2.1"}
        return {**{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}, **ours}

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle."""
        folder = self.folder
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        folder.chmod(0o755)
        ports = _free_ports(3)
        (folder / "slurm.conf").write_text(
            CONF.format(folder=folder, ports=ports, host=socket.gethostname()), encoding="utf-8"
        )
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ends = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={folder}/munge.{end}" for option, end in ends.items()]
        self._spawn("munged", "--foreground", "--force", *munge)
        wait_until(lambda: (folder / "munge.socket").exists(), "munged did not start")
        self._spawn("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._spawn("slurmd", "-D", "-N", node)
        states = ("sinfo", "-h", "-N", "-p", "main", "-o", "%t")
        wait_until(lambda: self.run(*states).split() == ["idle", "idle"], "the nodes are not idle")

    def _spawn(self, *command: str) -> None:
        with (self.folder / f"{command[0]}{len(self.daemons)}.out").open("wb") as out:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=out))

    def run(self, *command: str) -> str:
        """The output of one of SLURM's commands; of sinfo while the controller comes up, nothing."""
        return subprocess.run(command, env=self.environment, capture_output=True, encoding="utf-8").stdout

    def state(self, job: str) -> str:
        """The job's state as scontrol has it, such as RUNNING."""
        words = self.run("scontrol", "show", "job", job).split()
        return next((word.partition("=")[2] for word in words if word.startswith("JobState=")), "GONE")

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """Waits until the job is in one of the states and returns it."""
        wait_until(lambda: self.state(job) in states, lambda: f"{self._about(job)}, expected one of {states}", seconds)
        return self.state(job)

    def _about(self, job: str) -> str:
        """State, reason and output of a job, and what the controller wrote last, for a failing test."""
        shown = self.run("scontrol", "show", "job", job)
        path = next((word.partition("=")[2] for word in shown.split() if word.startswith("StdOut=")), "")
        said = Path(path).read_text(encoding="utf-8") if path and Path(path).exists() else ""
        log = (self.folder / "slurmctld.log").read_text(encoding="utf-8").splitlines()[-40:]
        return "\n".join([f"job {job} is {self.state(job)}", shown, said, *log])

    def stop(self) -> None:
        """Ends the daemons and what still runs under them."""
        self.run("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(ready, reason="it does not come", seconds: float = 60) -> None:
    """Polls ``ready()``; after so many seconds fails with the reason, or with what ``reason()`` then says."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise AssertionError(reason if isinstance(reason, str) else reason())
        time.sleep(0.2)
