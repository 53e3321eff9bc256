"""A device that is not the CPU, on machines without a GPU: see device.cpp."""

import functools
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils import backend_registration, cpp_extension

NAME = "simulated"
MODULE = SimpleNamespace(
    is_available=lambda: True,
    is_initialized=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    manual_seed_all=lambda seed: None,
    _is_in_bad_fork=lambda: False,
)


@functools.cache
def start() -> str:
    """Make PyTorch know the device; gives its name."""
    paths = [f"-isystem{p}" for p in cpp_extension.include_paths()]
    libraries = [f"-L{p}" for p in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    source = str(Path(__file__).with_name("device.cpp"))
    backend_registration.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, MODULE)
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/device.so"
        options = ["-std=c++20", "-O0", "-shared", "-fPIC"]
        subprocess.run(["c++", *options, *paths, source, *libraries, "-o", built], check=True)
        torch.ops.load_library(built)
    return NAME
