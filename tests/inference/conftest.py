from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline.inference.weights import TrainedModel, load_trained
from pipeline.models.base import LanguageModel
from tests.inference.cases import FAMILIES, make_run


@dataclass(frozen=True)
class Made:
    """A run directory, and the model that its newest checkpoint holds."""

    run_dir: Path
    model: LanguageModel

    def load(self) -> TrainedModel:
        return load_trained(self.run_dir)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def made_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """A run of each family; tests only read them."""
    return {
        family: Made(*make_run(tmp_path_factory.mktemp(family), fields))
        for family, fields in FAMILIES.items()
    }


@pytest.fixture(params=list(FAMILIES))
def made(request: pytest.FixtureRequest, made_runs: dict[str, Made]) -> Made:
    return made_runs[request.param]


@pytest.fixture
def own_run(tmp_path: Path) -> Made:
    """A run of a GPT that the test may damage."""
    return Made(*make_run(tmp_path, FAMILIES["gpt"]))
