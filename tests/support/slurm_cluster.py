"""A real Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd of our own, on loopback.

The nodes share a host name, and tell themselves apart by ``SLURMD_NODENAME``. Nothing of it is installed or left.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
from pathlib import Path

from tests.support.ports import free_port
from tests.support.waiting import until

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
NODES = ("n1", "n2")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# Requeued jobs wait until credentials have expired, two minutes if left alone.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPort={ports[0]}
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=20
SlurmctldTimeout=10
SlurmdTimeout=10
OverTimeLimit=0
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
# This machine may have fewer cores than the scripts ask for.
SlurmdParameters=config_overrides
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=1000 Gres=gpu:8
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000 Gres=gpu:8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=60 State=UP
PartitionName=canceled Nodes=ALL PriorityTier=1 PreemptMode=CANCEL MaxTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=60 State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here; ``None`` if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "the daemons of the test cluster run as root"


class Cluster:
    """Started on creation; ``close`` ends it.

    Args:
        folder: for configuration, state and logs; its path must be short, sockets lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._jobs: list[str] = []
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(
            folder=folder, host=host, ports=[free_port() for _ in range(3)], nodes=NODES
        )
        (folder / "slurm.conf").write_text(text)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        for number in range(8):
            (folder / f"gpu{number}").touch()
        try:
            self._start_all()
        except BaseException:
            self.close()
            raise

    def _start_all(self) -> None:
        folder = self.folder
        kinds = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        files = [f"--{kind}={folder}/munge.{kind.removesuffix('-file')}" for kind in kinds]
        self._start("munged", "--foreground", "--force", *files)
        until(lambda: (folder / "munge.socket").exists(), 10, "munged did not start")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        until(lambda: self.states() == {"IDLE"}, 60, "the nodes did not come up")

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._start("slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """A node that falls silent: its daemon and all that runs there are killed."""
        for pid in self.processes(node=node):
            _kill(pid)
        self._end(f"slurmd -N {node}")

    def resume(self, node: str) -> bool:
        """Ask for a node back that was set down; whether it is.

        Slurm refuses to resume a node that has come back by itself, which it may do between any two commands.
        """
        with contextlib.suppress(AssertionError):
            self.ask("scontrol", "update", f"nodename={node}", "state=resume")
        return not any("DOWN" in state for state in self.states())

    def states(self) -> set[str]:
        """States of the nodes."""
        lines = self.ask("scontrol", "show", "node", "--oneliner").splitlines()
        return {
            word.partition("=")[2] for line in lines for word in line.split() if word.startswith("State=")
        }

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """``sbatch`` from the repository's root; the job's number."""
        command = ("sbatch", "--parsable", *options, script, *arguments)
        job = self.ask(*command, **variables).strip()
        self._jobs.append(job)
        return job

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: ``JobState``, ``Restarts`` ..."""
        words = self.ask("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def processes(self, job: str | None = None, node: str | None = None) -> list[int]:
        """Processes that belong to a job's steps and batch script, or run on a node."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() not in environment:
                continue
            of_job = job is None and any(v.startswith(b"SLURM_JOB_ID=") for v in environment)
            of_job = of_job or f"SLURM_JOB_ID={job}".encode() in environment
            if of_job and (node is None or f"SLURMD_NODENAME={node}".encode() in environment):
                found.append(int(entry.name))
        return found

    def ask(self, *command: str, **variables: str) -> str:
        """Run a client; what it prints."""
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            command, env={**self.environment, **variables}, cwd=root, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def close(self) -> None:
        """Cancel what still runs and end the daemons."""
        for job in self._jobs:
            subprocess.run(["scancel", "--quiet", job], env=self.environment, check=False)
        try:
            until(lambda: not self.processes(), 40, "jobs survived")
        finally:
            for pid in self.processes():
                _kill(pid)
            for name in reversed(list(self._daemons)):
                self._end(name)

    def _start(self, *command: str) -> None:
        name = " ".join(part for part in command if part not in ("-D", "-c"))
        with (self.folder / "daemons.log").open("ab") as log:
            # They end with the tests, however those end.
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], env=self.environment, stdout=log, stderr=log
            )

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.kill() if name.startswith("slurmd") else daemon.terminate()
        daemon.wait()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)
