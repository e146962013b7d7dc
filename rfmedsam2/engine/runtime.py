"""Runtime of a training process: device, ranks (under torchrun, any number of nodes) and precision."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from rfmedsam2.engine.cpu_bf16 import CpuBf16
from rfmedsam2.errors import PlanError, WorkerError
from rfmedsam2.system.devices import choose_device
from rfmedsam2.system.memory import free_bytes, keep_freed_memory
from rfmedsam2.system.ranks import ranks_of, require_team

T = TypeVar("T")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
LOST_PEER = ("peer", "Connection", "NCCL", "Socket", "ECONN", "Timed out", "timed out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One process of a training: its device and rank."""

    device: torch.device
    precision: torch.dtype = torch.float32
    """Autocast dtype."""
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Number of processes on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes all files."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast context of this runtime's precision."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def whole_gradients(self) -> AbstractContextManager[Any]:
        """Context for forward and backward passes in which all gradients are right and fast, see `CpuBf16`."""
        return CpuBf16() if self.device.type == "cpu" and self.precision == torch.bfloat16 else nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, on this runtime's device."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over all ranks, on this runtime's device."""
        return self.sum(tensor) / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; also acts as a barrier."""
        return flag if self.world_size == 1 else bool(self.sum(torch.tensor(float(flag))).item())

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def memory_mb(self) -> float | None:
        """Peak device memory used by tensors, MiB; None on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return torch.mps.current_allocated_memory() / 2**20 if self.device.type == "mps" else None

    def free_bytes(self) -> int:
        """Free device memory in bytes; MPS shares the machine's memory."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return free_bytes()


@contextmanager
def start_runtime(
    device: str = "auto", *, precision: Precision = "auto", timeout_seconds: float = 1800.0
) -> Iterator[Runtime]:
    """Choose the device and, under torchrun, join the other ranks (nccl on CUDA, else gloo).

    Args:
        device: "auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:1", "mps".
        precision: see TrainConfig.precision.
        timeout_seconds: how long a rank waits for the others; must cover the slowest rank's validation.

    Raises:
        UsageError: the device is not available, or torchrun's variables are not valid.
        PlanError: the device does not support the precision.
        WorkerError: another rank has ended.
    """
    ranks = ranks_of(os.environ)
    require_team(ranks, os.environ)
    chosen = choose_device(device, local_rank=ranks.local_rank)
    runtime = Runtime(
        device=chosen,
        precision=choose_precision(precision, chosen),
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
    )
    if chosen.type == "cpu":
        keep_freed_memory(os.environ)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if ranks.world_size == 1:
        yield runtime
        return
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        device_id=chosen if chosen.type == "cuda" else None,
    )
    try:
        with report_lost_ranks(runtime):
            yield runtime
    finally:
        # DDP and its hooks hold the group in reference cycles; if they live until interpreter exit, gloo's threads
        # abort the process in about every third run (torch 2.15)
        gc.collect()
        dist.destroy_process_group()


def choose_precision(wanted: Precision, device: torch.device) -> torch.dtype:
    """Choose the compute dtype; auto: bf16 if the hardware supports it, else fp16 on a GPU and fp32 elsewhere."""
    if wanted == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if wanted == "fp16" and device.type == "cpu":
        raise PlanError(
            "fp16 training needs a GPU", where="train.precision", found="cpu", remedy="Use fp32, bf16 or auto on a CPU"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16: measured, a training step takes 1/3 of fp32's time with AMX, 2/3 with AVX512."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextmanager
def report_lost_ranks(runtime: Runtime) -> Iterator[None]:
    """Turn the communication library's error about a lost rank into a `WorkerError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, WorkerError) or runtime.world_size == 1 or not any(w in str(error) for w in LOST_PEER):
            raise
        raise WorkerError(
            "Another process of this training has ended or does not respond",
            where=f"rank {runtime.rank} of {runtime.world_size} waited for it",
            found=str(error).splitlines()[0][:200],
            remedy="The first error above is the cause; run the same command again to resume",
        ) from error


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Use only deterministic kernels inside the `with` block; all settings are restored after it.

    Raises:
        PlanError: an operation has no deterministic implementation on this device.
    """
    if not wanted:
        yield
        return
    # cuBLAS reads this when it starts; harmless if it is already set or cuBLAS is not used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error) or isinstance(error, WorkerError):
            raise
        raise PlanError(
            "This model cannot be trained deterministically on this device",
            where="train.deterministic",
            found=str(error).splitlines()[0][:200],
            remedy="Set train.deterministic to false, or train on the CPU",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def to_device(batch: T, device: torch.device) -> T:
    """Move a batch to `device`: tensors, and dataclasses, dicts, lists and tuples of them; other values stay."""
    moved: Any = batch
    if isinstance(batch, Tensor):
        # a copy from pageable memory would wait for all queued kernels
        pinned = batch.pin_memory() if device.type == "cuda" and batch.device.type == "cpu" else batch
        moved = pinned.to(device, non_blocking=True)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [f.name for f in dataclasses.fields(batch) if f.init]
        moved = dataclasses.replace(batch, **{n: to_device(getattr(batch, n), device) for n in fields})
    elif isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
    elif isinstance(batch, list):
        moved = [to_device(value, device) for value in batch]
    elif isinstance(batch, tuple) and type(batch) is tuple:
        moved = tuple(to_device(value, device) for value in batch)
    return moved


def tensor_bytes(batch: object) -> int:
    """Size of all tensors of a batch, as `to_device` finds them."""
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, dict):
        return sum(tensor_bytes(value) for value in batch.values())
    if isinstance(batch, list | tuple):
        return sum(tensor_bytes(value) for value in batch)
    names = getattr(batch, "__dataclass_fields__", ())
    return sum(tensor_bytes(getattr(batch, name)) for name in names)


def resident_mb() -> float:
    """Resident memory of this process, MiB."""
    return psutil.Process().memory_info().rss / 2**20
