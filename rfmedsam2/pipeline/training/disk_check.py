"""Whether the disk has room for what a training computes beforehand: logits of Step 0, cached features."""

from __future__ import annotations

import shutil
from pathlib import Path

from rfmedsam2.errors import StoreError


def require_room(needed: int, folder: Path, *, what: str, amount: str, instead: str, disk: Path) -> None:
    """Check the room before anything is computed.

    Args:
        needed: bytes.
        folder: where they will lie.
        what: what they are, in words.
        amount: how many of it, in words.
        instead: what else the user can do than to free space.
        disk: an existing folder on the same disk.

    Raises:
        StoreError: the disk has less free.
    """
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise StoreError(
            f"The disk has too little room for {what}",
            where=folder,
            expected=f"{needed / 1e9:.3g} GB for {amount}",
            found=f"{free / 1e9:.3g} GB free",
            remedy=f"Free space on that disk, {instead}",
        )
