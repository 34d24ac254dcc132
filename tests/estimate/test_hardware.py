"""Hardware as data: shipped files are complete, and a figure that is missing is named."""

from pathlib import Path

import pytest
import yaml

from pipeline.config.cluster import ClusterConfig
from pipeline.config.hardware import LOOK_UP, Failures, HardwareConfig, Link, Price
from pipeline.config.load import load_cluster
from pipeline.errors import ConfigError
from tests.estimate.published import CLUSTERS

SHIPPED = sorted(path for path in CLUSTERS.glob("*.yaml") if "hardware:" in path.read_text())


def test_the_machines_that_are_promised_are_shipped() -> None:
    sizes = {path.stem: load_cluster(path).num_workers for path in SHIPPED}
    assert sizes == {
        "a100-8": 8, "cpu-2-cores": 2, "gpu-24gb": 1, "h100-1024": 1024, "h100-64": 64, "h100-8": 8,
    }  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_figure_of_a_shipped_file_has_a_comment_with_its_source(path: Path) -> None:
    """A number alone on its line, or with nothing behind it, would be a guess."""
    inside = path.read_text().partition("hardware:\n")[2].splitlines()
    headings = ("intra_node:", "inter_node:", "peak_flops_per_second:")
    plain = ("num_nodes", "devices_per_node", "device:", "kind:", *headings)
    # One source stands behind the heading of the peaks, or behind each of them.
    peaks = ("fp16:", "fp32:", "bf16:")
    bare = [
        line.strip()
        for line in inside
        if "#" not in line and not line.strip().startswith((*plain, *peaks))
    ]
    assert not bare
    assert any("#" in line for line in inside if line.strip().startswith((*peaks, "peak_flops")))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_cluster_uses_all_of_its_devices(path: Path) -> None:
    cluster = load_cluster(path)
    assert cluster.hardware is not None
    assert cluster.num_workers * cluster.threads_per_worker == cluster.hardware.num_devices


@pytest.mark.parametrize(
    "name", [n for n, f in HardwareConfig.model_fields.items() if f.is_required()]
)
def test_a_missing_figure_is_named_with_the_place_to_look_it_up(tmp_path: Path, name: str) -> None:
    tree = yaml.safe_load((CLUSTERS / "h100-8.yaml").read_text())
    del tree["hardware"][name]
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert f"hardware.figures are missing: {name} ({LOOK_UP[name]})" in str(caught.value)


def test_every_required_figure_says_where_it_is_found() -> None:
    kinds = (HardwareConfig, Link, Price, Failures)
    required = {n for kind in kinds for n, f in kind.model_fields.items() if f.is_required()}
    assert required <= set(LOOK_UP)


def test_several_devices_need_a_link_between_them() -> None:
    tree = yaml.safe_load((CLUSTERS / "h100-8.yaml").read_text())["hardware"]
    with pytest.raises(ValueError, match="figures are missing: intra_node"):
        HardwareConfig.model_validate({**tree, "intra_node": None})
    with pytest.raises(ValueError, match="figures are missing: inter_node"):
        HardwareConfig.model_validate({**tree, "num_nodes": 2})


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_workers=9 ranks.*nearest: num_workers=8"):
        load_cluster(CLUSTERS / "h100-8.yaml", ["num_workers=9"])


def test_a_cluster_without_hardware_loads_as_before() -> None:
    assert ClusterConfig().hardware is None
    assert load_cluster(CLUSTERS / "local-2.yaml").hardware is None


def test_devices_lose_speed_with_each_that_computes_beside_them() -> None:
    """A quarter is lost when all 8 are busy; beside 3 of 7 others, three sevenths of it."""
    tree = yaml.safe_load((CLUSTERS / "h100-8.yaml").read_text())["hardware"]
    hardware = HardwareConfig.model_validate({**tree, "crowded_fraction": 0.75})
    assert [hardware.crowding(busy) for busy in (1, 8, 16)] == [1.0, 0.75, 0.75]
    assert hardware.crowding(4) == pytest.approx(1 - 0.25 * 3 / 7)
