"""How much memory may still be taken."""

from __future__ import annotations

import errno
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from support.fresh_interpreters import run_each

from rfmedsam2.system.memory import free_bytes, group_bytes, memory_ran_out, memory_words, total_bytes

UNLIMITED = (1 << 63) - 4096
LIMITED = """
import resource
from rfmedsam2.system.memory import free_bytes
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20),) * 2)
print(free_bytes() >> 20)
"""


def group(folder: Path, version: int, limit: object, used: int, droppable: int) -> None:
    """The files of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    field = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{field} {droppable}\nfile 7\n")


PACKING = """
import resource
import numpy as np
from rfmedsam2.pipeline.preprocessing.case_reader import _packed as kept
from rfmedsam2.pipeline.selection.learning import _compressed as compressed
from rfmedsam2.store.packed_arrays import packed
array = np.random.default_rng(0).integers(0, 2**62, (64, 256, 256), dtype=np.int64)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (33 << 20),) * 2)
for pack in (kept, compressed, lambda array: packed(array, (32, 64, 64))):
    try:
        pack(array)
    except MemoryError as error:
        print(error)
"""


COMPILING = """
import resource
import numpy as np
from rfmedsam2.transforms.augment_kernels import distinct_labels
print(distinct_labels(np.array([1, 2, 2])))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (20 << 20),) * 2)
print(distinct_labels(np.array([1, 3, 3])))
try:
    distinct_labels(np.array([1, 2, 2], np.uint16))
except MemoryError as error:
    print(error)
"""


def test_without_limits_it_is_what_the_machine_has_left():
    assert 0 < free_bytes() <= psutil.virtual_memory().total


@pytest.mark.skipif(platform.system() != "Linux", reason="address space is counted in /proc")
def test_a_limit_within_compression_is_an_error_and_no_crash():
    """blosc2 ends the process with a segmentation fault where it gets no memory."""
    done = subprocess.run([sys.executable, "-c", PACKING], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("Unable to allocate 40.0 MiB for an array") == 3, done


@pytest.mark.skipif(platform.system() != "Linux", reason="address space is counted in /proc")
def test_a_limit_within_a_compilation_is_an_error_and_no_abort():
    """LLVM aborts the process where it gets no memory; what is compiled already runs on."""
    done = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("(2, 1, 2)\n(2, 1, 3)\nUnable to allocate 24.0 MiB for an array"), done


def test_every_group_above_the_process_counts(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job_1\n")
    group(tmp_path / "slurm", 2, 5000, 1000, 100)
    group(tmp_path / "slurm" / "job_1", 2, "max", 900, 0)
    assert list(group_bytes(tmp_path, own)) == [4100]
    group(tmp_path / "slurm" / "job_1", 2, 2000, 900, 300)
    assert list(group_bytes(tmp_path, own)) == [4100, 1400]


def test_groups_of_the_first_version_and_of_a_container(tmp_path):
    """Inside a container the path is the host's, and the mounted group its own."""
    own = tmp_path / "cgroup"
    own.write_text("7:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/\n")
    group(tmp_path / "memory", 1, 3000, 2500, 400)
    assert list(group_bytes(tmp_path, own)) == [900]
    group(tmp_path / "memory" / "docker" / "1", 1, UNLIMITED, 2500, 400)
    assert min(group_bytes(tmp_path, own)) == 900


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/gone\n"])
def test_where_nothing_can_be_told_there_is_no_limit(tmp_path, text):
    own = tmp_path / "cgroup"
    assert list(group_bytes(tmp_path, own)) == []
    own.write_text(text)
    assert list(group_bytes(tmp_path, own)) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_the_limit_of_the_process_counts():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=60)
    assert 250 < int(done.stdout) <= 300, done.stderr


def test_the_total_is_the_least_that_is_granted(tmp_path, monkeypatch):
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job_1\n")
    group(tmp_path / "slurm", 2, 5000, 1000, 100)
    group(tmp_path / "slurm" / "job_1", 2, 3000, 900, 0)
    monkeypatch.setattr("rfmedsam2.system.memory._GROUPS", tmp_path)
    monkeypatch.setattr("rfmedsam2.system.memory._OWN", own)
    assert total_bytes() == 3000
    own.write_text("")
    assert total_bytes() == psutil.virtual_memory().total


def raised(make: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:
        make()
    return caught.value


def no_memory() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize(
    "make",
    [lambda: torch.empty(1 << 56), lambda: np.empty(1 << 56), lambda: torch.zeros(1 << 50).double(), no_memory],
)
def test_memory_that_ended_is_known_by_what_libraries_raise(make: Callable[[], object]) -> None:
    assert memory_ran_out(raised(make))


@pytest.mark.parametrize("words", ["could not create a primitive", "std::bad_alloc", "can't start new thread"])
def test_memory_that_ended_is_known_by_their_words(words: str) -> None:
    assert memory_ran_out(RuntimeError(words))
    assert not memory_ran_out(ValueError(words))


def test_an_error_of_handling_it_is_one_of_memory() -> None:
    """llvmlite says that its library could not be found."""

    def load(first: Exception) -> None:
        try:
            raise first
        except OSError:
            raise OSError("Could not find/load shared object file 'libllvmlite.so'")  # noqa: B904 - as it does

    assert memory_ran_out(raised(lambda: load(OSError("x.so: failed to map segment from shared object"))))
    assert not memory_ran_out(raised(lambda: load(OSError("x.so: invalid ELF header"))))


@pytest.mark.parametrize(
    "make", [lambda: torch.zeros(2) @ torch.zeros(3), Path("/nothing").read_bytes, lambda: np.zeros(2) + np.zeros(3)]
)
def test_other_errors_are_not_of_memory(make: Callable[[], object]) -> None:
    assert not memory_ran_out(raised(make))


def test_what_is_used_and_free_is_told() -> None:
    assert re.fullmatch(r"\d+\.\d GiB in use by this process, \d+\.\d GiB more available", memory_words())


PAGES = """
import resource
import numpy as np
from rfmedsam2.system.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(2_000_000)  # 16 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can")
def test_freed_memory_is_used_again_unless_the_user_chose_otherwise() -> None:
    codes = {
        "kept": f"{PAGES}\nmade = keep_freed_memory({{}}); faults(); answer = [made, faults()]",
        "chosen": f"{PAGES}\nanswer = [keep_freed_memory({{'MALLOC_ARENA_MAX': '1'}}), 0]",
    }
    found = {name: answer for name, (answer, _) in run_each(codes).items()}
    assert found["chosen"] == [False, 0]
    made, again = found["kept"]
    assert made
    assert again < 2_000  # pages: every array has 3,900
