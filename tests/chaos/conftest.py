from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.harness import Chaos, History, chaos_run, nothing_left
from tests.training.cases import write_prepared

Golden = Callable[..., History]


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture
def chaos(tmp_path: Path, prepared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chaos]:
    with nothing_left():
        yield Chaos(tmp_path, prepared_dir, monkeypatch)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory, prepared_dir: Path) -> Golden:
    """Give the run without faults of a family and stage; two of them must agree to count."""
    kept: dict[tuple[str, int], History] = {}
    root = tmp_path_factory.mktemp("golden")

    def give(family: str = "gpt", stage: int = 1) -> History:
        if (family, stage) not in kept:
            with pytest.MonkeyPatch.context() as patch:
                place = Chaos(root, prepared_dir, patch)
                runs = []
                for number in (1, 2):
                    run_dir = place.make(f"{family}-{stage}-{number}", chaos_run(family, stage))
                    runs.append(place.survive(run_dir))
            first, second = runs
            assert [len(run.endings) for run in runs] == [1, 1]
            assert (first.losses, first.samples) == (second.losses, second.samples)
            assert first.weights == second.weights, "two runs without faults differ"
            kept[family, stage] = first
        return kept[family, stage]

    return give
