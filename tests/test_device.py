"""device_cases.py in a process of its own: PyTorch has to know the simulated device before it takes its first gradient."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def test_on_another_device_than_the_cpu():
    if not shutil.which("c++"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no simulated device for the tests: there is no c++")
    cases = Path(__file__).with_name("device_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(cases)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # not one of this session's workers
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
