"""SLURM on this machine alone: munge, controller and node daemon in a scratch folder, on loopback, as root.

Debian: ``apt-get install slurm-wlm munge``. Needs neither systemd nor cgroups: processes are tracked by their
parents, and the node may promise more cores than it has.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self, final

__all__ = ["LoopbackSlurm", "missing"]

CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={controller}
SlurmdPort={node}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return what keeps SLURM from being started here; empty if nothing does."""
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd wants to be root"


@final
class LoopbackSlurm:
    """A cluster of one node; `environment` is what `sbatch` must see. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: list[subprocess.Popen[str]] = []
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        folder, munge = self._folder, self._folder / "munge"
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir(parents=True, mode=0o700)
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o400)
        controller, node = free_port(), free_port()
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=socket.gethostname(), folder=folder, controller=controller, node=node)
        )
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        options = (
            "--foreground",
            "--force",
            *(f"--{option}={munge / name}" for option, name in files.items()),
        )
        for command in (("munged", *options), ("slurmctld", "-D", "-c"), ("slurmd", "-D", "-c")):
            self._daemons.append(self._open(*command))
        for _ in range(60):
            if self._idle():
                return
            time.sleep(1)
        raise RuntimeError(f"no idle node after a minute; see {folder}/slurmctld.log and slurmd.log")

    def _open(self, *command: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE if command[0] == "sinfo" else subprocess.DEVNULL
        environment = {**os.environ, **self.environment}
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def _idle(self) -> bool:
        return "idle" in self._open("sinfo", "--noheader", "--format=%T").communicate(timeout=60)[0]

    def _stop(self) -> None:
        """End the daemons, the last one first."""
        while self._daemons:
            daemon = self._daemons.pop()
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
