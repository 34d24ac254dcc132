from collections.abc import Iterator

import pytest

from tests.training.rank_pool import RankPool

Pools = dict[tuple[int, bool], RankPool]
"""World size, and whether for ZeRO 3, to warm ranks."""


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    """Start each pool when it is first called.

    An engine of ZeRO 3 replaces torch's linear function for the rest of its process, so it has
    processes of its own.
    """
    pools = {(size, sharded): RankPool(size) for size in (1, 2, 4) for sharded in (False, True)}
    yield pools
    for pool in pools.values():
        pool.stop()
