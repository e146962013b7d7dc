"""What torchrun says in environment variables, and what somebody else writes there."""

from __future__ import annotations

import pytest

from rfmedsam2.errors import UsageError
from rfmedsam2.system.ranks import ranks_of, require_team

MASTER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_without_variables_there_is_one_process() -> None:
    ranks = ranks_of({"RANK": ""})
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (0, 1, 0, 1)
    assert ranks.is_main
    require_team(ranks, {})


def test_torchruns_variables_are_read() -> None:
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | MASTER
    ranks = ranks_of(given)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (3, 4, 1, 2)
    assert not ranks.is_main
    require_team(ranks, given)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("text", ["abc", "-1", "1.5", "0x1", "9" * 5000])
def test_nonsense_is_a_sentence_that_names_the_variable(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"environment variable {name} is not valid"):
        ranks_of({name: text})


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_team_has_at_least_one_process(name: str) -> None:
    with pytest.raises(UsageError, match="a whole number from 1"):
        ranks_of({name: "0"})


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"RANK": "3"}, "rank 3 of 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"} | MASTER, "rank 2 of 2"),
        ({"WORLD_SIZE": "2"}, "rank 0 of 2 without MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_a_rank_without_a_team_is_a_sentence(given: dict[str, str], found: str) -> None:
    with pytest.raises(UsageError, match=f"do not describe a team.*{found}"):
        require_team(ranks_of(given), given)


@pytest.mark.parametrize("port", ["abc", "-1", "65536", "9" * 5000])
def test_a_port_that_is_none_is_a_sentence(port: str) -> None:
    given = {"WORLD_SIZE": "2"} | MASTER | {"MASTER_PORT": port}
    with pytest.raises(UsageError, match=r"environment variable MASTER_PORT is not valid.*from 0 to 65535"):
        require_team(ranks_of(given), given)
