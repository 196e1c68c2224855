"""Fixtures of groups of processes, for the conftest of a folder whose tests run on several ranks."""

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def groups() -> Iterator[dict[int, Ranks]]:
    made = {size: Ranks(size) for size in (1, 2, 3, 4)}
    yield made
    for ranks in made.values():
        ranks.close()


@pytest.fixture
def two(groups: dict[int, Ranks]) -> Ranks:
    return groups[2]


@pytest.fixture
def four(groups: dict[int, Ranks]) -> Ranks:
    return groups[4]


@pytest.fixture(params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, groups: dict[int, Ranks]) -> Ranks:
    return groups[request.param]
