"""Every config in configs/ loads, is short and says what it is for."""

from pathlib import Path

import pytest

from pipeline.config.cluster import check_run_on_cluster
from pipeline.config.data import DataConfig
from pipeline.config.explain import validate
from pipeline.config.load import load_cluster, load_run, load_study, read_yaml
from pipeline.data import SOURCES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def shipped(kind: str) -> list[Path]:
    return sorted((CONFIGS / kind).glob("*.yaml"))


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=by_name)
def test_a_shipped_config_is_short_and_says_purpose_and_cost_first(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 50
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 40


@pytest.mark.parametrize("path", shipped("run"), ids=by_name)
def test_a_shipped_run_loads_and_runs_on_one_or_two_cpu_ranks(path: Path) -> None:
    run = load_run(path)
    for num_workers in (1, 2):
        assert check_run_on_cluster(run, num_workers, "cpu").world_size == num_workers


@pytest.mark.parametrize("path", shipped("data"), ids=by_name)
def test_a_shipped_data_config_loads(path: Path) -> None:
    assert validate(DataConfig, read_yaml(path), str(path)).source.kind in SOURCES


@pytest.mark.parametrize("path", shipped("cluster"), ids=by_name)
def test_a_shipped_cluster_loads_and_its_hostfile_exists(path: Path) -> None:
    hostfile = load_cluster(path).hostfile
    assert hostfile is None or hostfile.is_file()


@pytest.mark.parametrize("path", shipped("study"), ids=by_name)
def test_a_shipped_study_loads(path: Path) -> None:
    assert len(load_study(path).families) > 1


def test_the_two_example_runs_have_the_same_size() -> None:
    runs = [load_run(CONFIGS / "run" / name) for name in ("gpt.yaml", "lstm_attention.yaml")]
    sizes = [run.model.num_parameters(2048).non_embedding for run in runs]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.001)
    assert runs[0].train == runs[1].train
