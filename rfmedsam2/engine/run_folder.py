"""The folder of a training: one run at a time works in it, and a new beginning moves what it holds aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.store.atomic import backup_folder
from rfmedsam2.store.lock import exclusive_lock


@contextmanager
def training_folder(folder: Path, runtime: Runtime, *, restart: bool) -> Iterator[None]:
    """Keep other runs out of a folder while inside.

    Args:
        folder: made if it is not there.
        runtime: the main rank holds the folder for all.
        restart: what the folder holds is kept beside it under another name.

    Raises:
        UsageError: another run works in it.
        StoreError: it cannot be written.
    """
    with ExitStack() as held:
        if runtime.is_main:
            if restart:
                with exclusive_lock(folder):
                    pass  # nobody trains in it
                backup_folder(folder)
            held.enter_context(exclusive_lock(folder))
        runtime.any(False)  # no rank looks at the folder before it has been moved
        yield
