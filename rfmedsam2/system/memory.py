"""Free memory for this process: of the machine, within cgroup limits, and within `ulimit -v`."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

_KEEPING = {
    -3: 32 << 20,  # M_MMAP_THRESHOLD: its largest value; larger blocks are mapped as before
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: unused memory at the end of the heap that is kept
    -2: 64 << 20,  # M_TOP_PAD: the heap grows by so much at a time
}
"""Options of glibc's mallopt (malloc.h)."""
_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


_WORDS = (
    "DefaultCPUAllocator",
    "could not create a primitive",
    "could not execute a primitive",
    "Failed to allocate memory",
    "bad_alloc",
    "Cannot allocate memory",
    "can't start new thread",
    "failed to map segment from shared object",
)
"""How torch, oneDNN, ITK, C++ and the system say that memory ran out, where the type of the error does not."""


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error, or one that was being handled when it was raised, says that memory ran out (CPU or GPU)."""
    if error.__context__ is not None and memory_ran_out(error.__context__):  # numba's library says "not found" then
        return True
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported
        return True
    return isinstance(error, RuntimeError | OSError | ImportError) and any(words in str(error) for words in _WORDS)


def memory_words() -> str:
    """What this process uses and may still allocate, for messages."""
    used, free = psutil.Process().memory_info().rss, free_bytes()
    return f"{used / 2**30:.1f} GiB in use by this process, {free / 2**30:.1f} GiB more available"


def free_bytes() -> int:
    """Memory in bytes that this process can still allocate before it fails or is killed; never below 0.

    The minimum of the machine's available memory, what the cgroup limits leave (Docker, Slurm), and what `ulimit -v`
    leaves. cgroup limits can be lower than physical memory; exceeding them gets the process OOM-killed.
    """
    return max(0, min(psutil.virtual_memory().available, *group_bytes(), *_limit_bytes()))


def require_allocatable(size: int) -> None:
    """Check before a library allocates that ends the process where it gets no memory, as blosc2 4.14 does.

    Only under `ulimit -v` allocations fail: then as much is allocated and given back. What the limit leaves is too
    low an estimate, as memory that was freed before is used again.

    Args:
        size: upper bound of what will be allocated, bytes.

    Raises:
        MemoryError: it cannot be allocated.
    """
    for _ in _limit_bytes():
        np.empty(size, np.uint8)


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Let the C library keep freed memory for this process's next request, instead of giving it back to the system.

    A training step on a CPU allocates and frees the same large tensors over and over. By default glibc maps each again,
    and the system must clear every page of it: a tenth of the processor time of a small U-Net's training.

    Args:
        environment: the environment variables.

    Returns:
        Whether it does now: only glibc can, and it is left alone where the user has set its variables.
    """
    if any(name.startswith("MALLOC_") for name in environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    return all(mallopt(option, value) for option, value in _KEEPING.items())


def total_bytes() -> int:
    """Memory of the machine, or what its cgroups grant (Docker, Slurm) where that is less."""
    return min([psutil.virtual_memory().total, *(granted for granted, _ in _groups(_GROUPS, _OWN))])


def group_bytes(groups: Path = _GROUPS, own: Path = _OWN) -> Iterator[int]:
    """Bytes left in each cgroup of this process; file pages that can be dropped at once count as free.

    Args:
        groups: mount point of the cgroups, version 1 or 2.
        own: file that lists the cgroups of this process.
    """
    return (left for _, left in _groups(groups, own))


def _groups(groups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Bytes granted and bytes left in each cgroup of this process that has a limit.

    Args:
        groups: mount point of the cgroups, version 1 or 2.
        own: file that lists the cgroups of this process.
    """
    try:
        lines = own.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            folder, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            folder = groups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # inside a container the path may be the host's; the container's own group is then the mount point
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            group = _granted_and_left(folder.joinpath(*parts[:depth]), *names)
            if group is not None:
                yield group


def _granted_and_left(folder: Path, limit: str, usage: str, droppable: str) -> tuple[int, int] | None:
    """Bytes granted and left in one cgroup; None if it has no limit or does not exist."""
    try:
        granted, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
        fields = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return granted, granted - used + int(fields.get(droppable, 0))
    except (OSError, ValueError):  # no such file, "max"
        return None


def _limit_bytes() -> Iterator[int]:
    if resource is None:
        return
    granted, _ = resource.getrlimit(resource.RLIMIT_AS)
    if granted != resource.RLIM_INFINITY:
        yield granted - psutil.Process().memory_info().vms
