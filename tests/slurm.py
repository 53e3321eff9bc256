"""A real SLURM cluster for the tests: two virtual nodes on this machine, up for a session of pytest."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PORTS = 3


def free_ports(n: int) -> int:
    """The first of `n` free ports in a row."""
    for first in range(21000, 29000, n):
        sockets = [socket.socket() for _ in range(n)]
        try:
            for port, s in enumerate(sockets, first):
                s.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for s in sockets:
                s.close()
    raise OSError(f"no {n} free ports in a row")


def give_up(why: str) -> None:
    """No cluster: a failure in CI, which installs SLURM, and a skipped test elsewhere."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no SLURM for the tests: {why}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Path]:  # its folder, with slurm.conf and log/
    """A running cluster; nothing of it, and no process of its jobs, is left afterwards."""
    if not shutil.which("slurmctld") and not (os.getuid() == 0 and shutil.which("apt-get")):
        give_up("install slurm-wlm and munge, as .ci/run does")
    root = tmp_path_factory.mktemp("slurm")
    up = ["bash", str(HERE / "slurm_up.sh"), str(root), str(free_ports(PORTS))]
    down = ["bash", str(HERE / "slurm_down.sh"), str(root)]
    started = subprocess.run(up, text=True, capture_output=True, timeout=300)
    try:
        if started.returncode:
            give_up(started.stderr[-2000:])
        os.environ["SLURM_CONF"] = str(root / "slurm.conf")
        yield root
    finally:
        ended = subprocess.run(down, text=True, capture_output=True, timeout=60)
        os.environ.pop("SLURM_CONF", None)
    assert ended.returncode == 0, ended.stderr
