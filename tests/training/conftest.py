from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.cases import write_prepared
from tests.training.rank_pool import RankPool
from tests.training.runs import Runs


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def pools(one_rank: RankPool, two_ranks: RankPool) -> Iterator[dict[int, RankPool]]:
    """Pools by world size; that of four ends with the module, for its memory."""
    four_ranks = RankPool(4)
    yield {1: one_rank, 2: two_ranks, 4: four_ranks}
    four_ranks.stop()


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture
def runs(tmp_path: Path, prepared_dir: Path) -> Runs:
    return Runs(tmp_path, prepared_dir)
