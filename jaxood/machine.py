"""What a program runs on: processors, memory, devices, versions."""

import importlib.metadata
import os
import pathlib
import platform
import re
from typing import Any

PACKAGES = ('jaxood', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'scikit-learn')
PLUGINS = ('jax-cuda13-plugin', 'jax-cuda13-pjrt', 'jax-cuda12-plugin', 'jax-cuda12-pjrt', 'libtpu')


def versions(packages=PACKAGES) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {name: version_of(name) for name in packages}
    return {name: version for name, version in found.items() if version is not None}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory() -> tuple[int | None, int | None]:
    """Bytes of main memory: all, and what can be had now; None where the system does not say."""
    try:
        found = pathlib.Path('/proc/meminfo').read_text()
    except OSError:
        return None, None
    size = lambda name: 1024 * int(re.search(rf'{name}: *([0-9]+) kB', found)[1])
    return size('MemTotal'), size('MemAvailable')


def peak() -> int:
    """Bytes of main memory that this process has held at most; 0 where the system does not say."""
    try:  # not ru_maxrss, which a process inherits from the one that started it
        found = pathlib.Path('/proc/self/status').read_text()
    except OSError:
        return 0
    return 1024 * int(re.search(r'VmHWM:\s*([0-9]+) kB', found)[1])


def processor() -> str:
    """The name of the CPU."""
    try:
        found = re.search(r'model name\s*: (.*)', pathlib.Path('/proc/cpuinfo').read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def facts() -> dict[str, Any]:
    """Hardware and versions, for what is measured on them. Starts JAX's devices."""
    import jax  # noqa: PLC0415 - commands parse before they import it

    return {
        'processor': processor(),
        'cores': cores(),
        'memory_bytes': memory()[0],
        'devices': [d.device_kind for d in jax.devices()],
        'platform': jax.default_backend(),
        'versions': versions((*PACKAGES, *PLUGINS, 'torch', 'diffusers'))
        | {'python': platform.python_version()},
    }
