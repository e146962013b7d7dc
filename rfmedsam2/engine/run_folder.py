"""The folder of a training: locked for one run at a time; a restart moves the previous contents aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.store.lock import exclusive_lock
from rfmedsam2.system.atomic import backup_folder


@contextmanager
def training_folder(folder: Path, runtime: Runtime, *, restart: bool) -> Iterator[None]:
    """Lock a folder against other runs inside the `with` block.

    Args:
        folder: the folder; created if it does not exist.
        runtime: the runtime; its main rank holds the lock for all ranks.
        restart: move the folder's contents to a folder beside it.

    Raises:
        UsageError: another run holds the lock.
        StoreError: the folder cannot be written.
    """
    with ExitStack() as held:
        if runtime.is_main:
            if restart:
                with exclusive_lock(folder):
                    pass  # raises if another run holds it
                backup_folder(folder)
            held.enter_context(exclusive_lock(folder))
        runtime.any(False)  # barrier: no rank reads the folder before it has been moved
        yield
