"""Which process of a training this is, as torchrun says it in environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rfmedsam2.errors import UsageError

_DEFAULTS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One process among those of a training."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes on this machine."""
    local_world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without them there is one process.

    Raises:
        UsageError: a variable that is not a number of this kind.
    """
    numbers = {name: _number(name, environment.get(name) or str(least), least) for name, least in _DEFAULTS.items()}
    return Ranks(**{name.lower(): number for name, number in numbers.items()})


def require_team(ranks: Ranks, environment: Mapping[str, str]) -> None:
    """Check that a training of several processes can find the others.

    Raises:
        UsageError: a rank outside the team, or no address of its first process, or no number as its port.
    """
    if ranks.world_size > 1 and (port := environment.get("MASTER_PORT")):
        _number("MASTER_PORT", port, 0, most=65535)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    found = f"rank {ranks.rank} of {ranks.world_size}"
    if ranks.rank >= ranks.world_size or (ranks.world_size > 1 and missing):
        raise UsageError(
            "The variables RANK and WORLD_SIZE do not describe a team of processes",
            expected="a rank below the world size, with MASTER_ADDR and MASTER_PORT for more than one process",
            found=found + (f" without {' and '.join(missing)}" if missing else ""),
            remedy="Start several processes with torchrun, or unset these variables to train in one",
        )


def _number(name: str, text: str, least: int, *, most: int | None = None) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < least or (most is not None and number > most):
        raise UsageError(
            f"The environment variable {name} is not valid",
            expected=f"a whole number from {least}{f' to {most}' if most else ''}, as torchrun sets it",
            found=repr(text[:40]),
            remedy=f"Start with torchrun, or unset {name}",
        )
    return number
