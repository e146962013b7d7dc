"""Report on this machine: versions, devices, memory, disks, limits and folders, with remedies for problems.

Works on broken installations: a missing or damaged package is a line of the report, never an error.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rfmedsam2.errors import RecordError, RfMedSamError
from rfmedsam2.pipeline.prediction.checkpoints import TrainedModel, find_ensembles, find_models, find_nnunet_models
from rfmedsam2.store.layout import Layout
from rfmedsam2.system.entry_points import KINDS, find, installed
from rfmedsam2.system.memory import free_bytes, total_bytes
from rfmedsam2.system.private_apis import missing as missing_private_apis
from rfmedsam2.version import __version__

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*(?:;.*extra == ['\"](\w+)['\"])?")
_NOT_SHOWN = ("test",)
"""Extras that only developers need."""
_GIB = 2**30
# below these, users of comparable pipelines report killed workers, full disks and "too many open files"
_LOW_RAM_GIB = 8.0
_LOW_DISK_GIB = 20.0
_LOW_SHM_GIB = 1.0
_LOW_OPEN_FILES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A compute device. Memory in GiB, None if unknown."""

    kind: str
    name: str
    memory_gib: float | None = None
    free_gib: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """One of raw, preprocessed, results: path, whether it can be written, free space in GiB."""

    name: str
    path: Path
    exists: bool
    writable: bool
    free_gib: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledExtension:
    """What another package adds to this one; `fault`: why it cannot be used, None where it can."""

    kind: str
    name: str
    package: str
    version: str
    fault: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """A trained model in the results folder; `plan`: its plans file, if nnU-Net trained it."""

    trained_by: Literal["rfmedsam2", "nnU-Net"]
    dataset: str
    plan: str
    configuration: str
    folds: tuple[str, ...]
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A problem, and its remedy."""

    message: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """The report. Sizes in GiB; None: does not exist, or unknown.

    Attributes:
        package: version of this package.
        python: version of Python; `executable` is its path.
        system: operating system and processor.
        packages: name -> version of required packages.
        optional_packages: name -> version of optional packages.
        extensions: networks, losses, augmentations, planners and tasks of other packages.
        devices: processor first, then accelerators.
        ram_gib, ram_free_gib: total and free memory of the machine (or of its container).
        shm_gib: free shared memory (/dev/shm), through which data loading processes pass batches.
        open_files: soft and hard limit of open files.
        compiler: C++ compiler that torch.compile would use.
        folders: the folders raw, preprocessed and results.
        folders_from: where the folders' paths come from.
        models: trained models in the results folder, nnU-Net's last.
        warnings: problems with remedies.
    """

    package: str
    python: str
    executable: str
    system: str
    packages: dict[str, str | None]
    optional_packages: dict[str, str | None]
    extensions: tuple[InstalledExtension, ...]
    devices: tuple[Device, ...]
    ram_gib: float
    ram_free_gib: float
    shm_gib: float | None
    open_files: tuple[int, int] | None
    compiler: str | None
    folders: tuple[Folder, ...]
    folders_from: str
    models: tuple[FoundModel, ...]
    warnings: tuple[Advice, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        content = asdict(self)
        for folder in content["folders"]:
            folder["path"] = str(folder["path"])
        for model in content["models"]:
            model["folder"] = str(model["folder"])
        return content


def doctor(layout: Layout | None = None, *, folders_from: str = "the default") -> DoctorReport:
    """Examine this machine.

    Args:
        layout: the folders that commands would use; None: below ./rfmed_data.
        folders_from: where their paths come from: a flag, a variable, or the default.
    """
    chosen = layout or Layout.under(Path("rfmed_data"))
    devices, trouble = _devices()
    needed, optional = _required_packages()
    facts: dict[str, Any] = {
        "packages": {name: _version(name) for name in needed},
        "optional_packages": {name: _version(name) for name in optional},
        "extensions": tuple(_extensions()),
        "devices": devices,
        "ram_gib": round(total_bytes() / _GIB, 1),
        "ram_free_gib": round(free_bytes() / _GIB, 1),
        "shm_gib": _free_gib(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,  # noqa: S108 - only inspected
        "open_files": _open_file_limits(),
        "compiler": _compiler(),
        "folders": tuple(_folder(name, getattr(chosen, name)) for name in ("raw", "preprocessed", "results")),
    }
    return DoctorReport(
        package=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.platform()} {platform.machine()}",
        folders_from=folders_from,
        models=tuple(_models(chosen.results)),
        warnings=(*trouble, *_warnings(facts)),
        **facts,
    )


def _required_packages() -> tuple[list[str], list[str]]:
    """Names of what this package needs, and of what its extras add, as its own metadata say.

    Both are empty where it runs from its sources without having been installed.
    """
    needed, optional = [], []
    for text in _requirements():
        found = _REQUIREMENT.match(text)
        if found is None or found[2] in _NOT_SHOWN:
            continue
        (needed if found[2] is None else optional).append(found[1])
    return needed, optional


def _requirements() -> list[str]:
    try:
        return metadata.requires("rfmedsam2") or []
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _extensions() -> Iterator[InstalledExtension]:
    """All that installed packages register, each imported to see whether it works."""
    for kind in KINDS:
        for each in installed(kind):
            fault = None
            try:
                find(kind, each.name).load()
            except RfMedSamError as error:
                fault = str(error)
            yield InstalledExtension(kind=kind, name=each.name, package=each.package, version=each.version, fault=fault)


def _models(results: Path) -> Iterator[FoundModel]:
    own: list[TrainedModel] = []
    nnunet: list[TrainedModel] = []
    with suppress(OSError):  # a folder that cannot be read is reported with the folders
        own, nnunet = find_models(results), find_nnunet_models(results)
        with suppress(RecordError):  # of a damaged ensemble, which rfmed_predict names
            own += find_ensembles(results)
    for model in (*own, *nnunet):
        yield FoundModel(
            trained_by="rfmedsam2" if model in own else "nnU-Net",
            dataset=model.dataset,
            plan=model.plan,
            configuration=model.stage,
            folds=model.folds,
            folder=model.folder,
        )


def _devices() -> tuple[tuple[Device, ...], list[Advice]]:
    """CPU and accelerators; errors of torch become warnings."""
    devices = [Device(kind="cpu", name=f"{_usable_cores()} cores, {_processor()}")]
    try:
        # imported by name at run time: reporting a missing or damaged torch is what this report is for
        torch: Any = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        remedy = "Install PyTorch again (pip install --force-reinstall torch)"
        return tuple(devices), [Advice(message=f"PyTorch cannot be loaded: {error}", remedy=remedy)]
    trouble: list[Advice] = []
    try:
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            devices.append(
                Device(
                    kind=f"cuda:{index}", name=name, memory_gib=round(total / _GIB, 1), free_gib=round(free / _GIB, 1)
                )
            )
    except RuntimeError as error:
        trouble.append(
            Advice(message=f"A CUDA device cannot be used: {error}", remedy="Check the driver with nvidia-smi")
        )
    if torch.backends.mps.is_available():
        devices.append(Device(kind="mps", name="Apple GPU (shares the machine's memory)"))
    return tuple(devices), trouble


def _usable_cores() -> int:
    # a container or scheduler may allow fewer cores than the machine has
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _open_file_limits() -> tuple[int, int] | None:
    return None if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)


def _compiler() -> str | None:
    return next((path for name in ("g++", "c++", "clang++", "cl") if (path := shutil.which(name))), None)


def _folder(name: str, path: Path) -> Folder:
    """Checks the nearest existing folder, because commands create missing ones."""
    nearest = next((p for p in (path, *path.absolute().parents) if p.exists()), Path())
    return Folder(
        name=name,
        path=path.absolute(),
        exists=path.is_dir(),
        writable=nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        free_gib=_free_gib(nearest),
    )


def _free_gib(path: Path) -> float | None:
    try:
        return round(shutil.disk_usage(path).free / _GIB, 1)
    except OSError:
        return None


def _warnings(facts: dict[str, Any]) -> Iterator[Advice]:
    if not facts["packages"]:
        remedy = "Install it, from its sources with: pip install -e ."
        yield Advice(message="rfmedsam2 is not installed: what it needs cannot be checked", remedy=remedy)
    missing = [name for name, version in facts["packages"].items() if version is None]
    if missing:
        remedy = f"pip install {' '.join(missing)}"
        yield Advice(message=f"Required packages are not installed: {', '.join(missing)}", remedy=remedy)
    if all(device.kind == "cpu" for device in facts["devices"]):
        remedy = "Plan with --preset cpu; on a machine with an NVIDIA GPU, install PyTorch for its CUDA version"
        yield Advice(message="No GPU was found: training and prediction run on the CPU", remedy=remedy)
    elif facts["compiler"] is None:
        remedy = "Install one (Debian: apt install build-essential), or train with compile off"
        yield Advice(message="torch.compile finds no C++ compiler and will not be used", remedy=remedy)
    for error in missing_private_apis():
        yield Advice(message=f"{error.what}: {error.where} (found {error.found})", remedy=error.remedy or "")
    for extension in facts["extensions"]:
        if extension.fault is not None:
            remedy = f"Update, reinstall or uninstall {extension.package}"
            yield Advice(message=extension.fault, remedy=remedy)
    yield from _memory_warnings(facts)
    for folder in facts["folders"]:
        if not folder.writable:
            remedy = "Choose another folder with --root, or ask for write permission"
            yield Advice(message=f"The {folder.name} folder cannot be written: {folder.path}", remedy=remedy)
    if any(folder.free_gib is not None and folder.free_gib < _LOW_DISK_GIB for folder in facts["folders"]):
        free = min(folder.free_gib for folder in facts["folders"] if folder.free_gib is not None)
        remedy = "Free space, or choose another disk with --root: preprocessed data can take tens of GiB"
        yield Advice(message=f"Only {free:g} GiB of disk are free", remedy=remedy)


def _memory_warnings(facts: dict[str, Any]) -> Iterator[Advice]:
    if facts["ram_free_gib"] < _LOW_RAM_GIB:
        remedy = "Close other programs, or run with fewer workers"
        yield Advice(message=f"Only {facts['ram_free_gib']:g} GiB of memory are free", remedy=remedy)
    if facts["shm_gib"] is not None and facts["shm_gib"] < _LOW_SHM_GIB:
        remedy = "Start the container with --shm-size=8g or --ipc=host, or train with 0 workers"
        yield Advice(message=f"Shared memory (/dev/shm) has only {facts['shm_gib']:g} GiB left", remedy=remedy)
    if facts["open_files"] is not None and 0 <= facts["open_files"][0] < _LOW_OPEN_FILES:
        remedy = f"Raise the limit first: ulimit -n {max(4096, _LOW_OPEN_FILES)}"
        yield Advice(message=f"Only {facts['open_files'][0]} files may be open at once", remedy=remedy)
