"""Every config in configs/ loads, is short and says what it is for."""

import re
from pathlib import Path

import pytest
import yaml

from pipeline.config.claims import load_claims
from pipeline.config.cluster import check_run_on_cluster
from pipeline.config.data import DataConfig
from pipeline.config.explain import known_families, validate
from pipeline.config.load import load_cluster, load_run, load_study, read_yaml
from pipeline.data import SOURCES

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
CLAIMS = CONFIGS / "study" / "claims.yaml"
"""No study, but what studies are judged by: as long as the seven claims and their gates are."""


def shipped(kind: str) -> list[Path]:
    return sorted(set((CONFIGS / kind).glob("*.yaml")) - {CLAIMS})


def test_the_page_of_models_lists_every_option_with_its_default() -> None:
    """A row is `| option | default | …`; options of several families stand in one row."""
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", (ROOT / "docs/models.md").read_text(), re.M)
    listed = {(name, str(yaml.safe_load(default))) for name, default in rows}
    assert len(listed) == len(rows)
    fields = {
        (name, str(field.default))
        for kind in known_families().values()
        for name, field in kind.model_fields.items()
        if name != "family"
    }
    assert listed == fields


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=by_name)
def test_a_shipped_config_is_short_and_says_purpose_and_cost_first(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 50 or path == CLAIMS
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


def test_the_shipped_claims_load() -> None:
    assert len(load_claims(CLAIMS).claims) == 7


def test_the_two_example_runs_have_the_same_size() -> None:
    runs = [load_run(CONFIGS / "run" / name) for name in ("gpt.yaml", "lstm_attention.yaml")]
    sizes = [run.model.num_parameters(2048).non_embedding for run in runs]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.001)
    assert runs[0].train == runs[1].train


def test_the_two_recipes_have_the_same_size_and_budget() -> None:
    names = ("gpt_125m_fineweb10b.yaml", "lstm_125m_fineweb10b.yaml")
    runs = [load_run(CONFIGS / "run" / name) for name in names]
    counts = [run.model.num_parameters(50304) for run in runs]
    assert counts[0].total == pytest.approx(125e6, rel=0.02)
    assert counts[1].total == pytest.approx(counts[0].total, rel=0.01)
    assert counts[1].non_embedding == pytest.approx(counts[0].non_embedding, rel=0.01)
    assert runs[1].train.total_tokens == pytest.approx(runs[0].train.total_tokens, rel=0.001)
    assert runs[1].data == runs[0].data
    assert all("UNVERIFIED" in (CONFIGS / "run" / name).read_text() for name in names)
    for run in runs:
        for num_workers in (1, 2, 4, 8):
            check_run_on_cluster(run, num_workers, "cuda")
