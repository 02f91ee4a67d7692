"""A real Slurm with two nodes on this machine, for tests: munged, slurmctld and two slurmd on free ports.

Everything lies in one temporary folder. Needs root, as `slurmctld` of the distributions' packages does here.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
NODES = ("n1", "n2")
GPUS = 2
"""Fake GPUs of each node: character devices that lead nowhere."""
CPUS = 4
WAIT = 30.0
"""Seconds until every daemon must answer."""

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
GresTypes=gpu
ReturnToService=2
KillWait=10
MinJobAge=300
InactiveLimit=0
SlurmctldTimeout=300
SlurmdTimeout=300
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Gres=gpu:{gpus}"


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that are not installed; /usr/sbin is searched as well."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """A running cluster."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))},
            "PATH": _path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        folder = self._folder
        (folder / "state").mkdir(parents=True)
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + len(NODES))
        nodes = [
            NODE.format(name=name, host=host, port=port, cpus=CPUS, gpus=GPUS)
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        text = CONFIG.format(host=host, port=ports[0], folder=folder, nodes="\n".join(nodes))
        (folder / "slurm.conf").write_text(text)
        devices = [folder / f"gpu{number}" for number in range(GPUS)]
        for device in devices:
            os.mknod(device, 0o20666, os.makedev(1, 3))  # as /dev/null
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))

        munged = ["munged", "--foreground", "--force", "--num-threads=1", f"--socket={folder}/munge.socket"]
        munged += [f"--key-file={key}", f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log"]
        self._spawn([*munged, f"--seed-file={folder}/munged.seed"])
        _wait_for(lambda: (folder / "munge.socket").exists(), "munged", self._folder)
        self._spawn(["slurmctld", "-D", "-c"])
        for name in NODES:
            self._spawn(["slurmd", "-D", "-N", name])
        idle = ["sinfo", "--noheader", "--format=%T %D"]
        _wait_for(lambda: f"idle {len(NODES)}" in self.call(*idle), "slurmctld and slurmd", self._folder)

    def call(self, *command: str) -> str:
        """What a command of Slurm prints, whether it succeeds or not."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def stop(self) -> None:
        """Cancel every job and end the daemons, by their process ids."""
        with suppress(OSError, subprocess.SubprocessError):
            self.call("scancel", "--user=root", "--full", "--signal=KILL")
            self.call("scancel", "--user=root")
            deadline = time.monotonic() + 10
            while self.call("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _spawn(self, command: list[str]) -> None:
        log = self._folder / f"{command[0]}-{len(self._daemons)}.out"
        if setpriv := shutil.which("setpriv"):  # also when the tests are killed
            command = [setpriv, "--pdeathsig", "TERM", *command]
        with open(log, "wb") as file:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            )


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster whose files lie in `folder`, which does not exist yet; stopped also after an exception."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        with closing(opened):
            pass
    return ports


def _wait_for(due: object, what: str, folder: Path) -> None:
    assert callable(due)
    deadline = time.monotonic() + WAIT
    while not due():
        if time.monotonic() > deadline:
            logs = [f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in folder.glob("*.log")]
            raise RuntimeError("\n".join([f"{what} did not start within {WAIT:.0f} s", *logs]))
        time.sleep(0.1)
