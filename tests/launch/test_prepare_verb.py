"""Three sources from `prepare` to its log, its run in MLflow, `inspect`, and a run that mixes them.

Ray is started once, by the first command.
"""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from launch.cli import main
from pipeline.tracking.events import read_events
from pipeline.tracking.mlflow_client import connected, default_uri
from pipeline.tracking.store import read_result

pytestmark = pytest.mark.slow

NUM_DOCUMENTS = 20
"""Of each source."""
KINDS = {"novels": "jsonl", "peps": "jsonl", "code": "parquet"}


@dataclass(frozen=True)
class Prepared:
    root: Path
    run: Path
    texts: dict[str, list[str]]
    facts: dict[str, Any]
    """What `prepare --json` answered."""

    @property
    def directory(self) -> Path:
        return Path(self.facts["directory"])


@pytest.fixture(scope="module")
def prepared(
    tiny_run: Path, migrated_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    """Two sources of JSON lines with the same ids, and a Parquet file without ids."""
    root = tmp_path_factory.mktemp("mixed")
    texts = {
        name: [f"{name} {number}: " + "sun moon river " * 12 for number in range(NUM_DOCUMENTS)]
        for name in KINDS
    }
    for name in ("novels", "peps"):
        lines = [json.dumps({"id": str(i), "text": text}) for i, text in enumerate(texts[name])]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.table({"content": texts["code"]}), root / "code.parquet", row_group_size=7)
    sources = {
        name: {"kind": kind, "path": str(root / f"{name}.{kind}")} for name, kind in KINDS.items()
    }
    sources["code"] |= {"text_column": "content", "id_column": None}
    tree = yaml.safe_load(tiny_run.read_text()) | {"output_dir": str(root / "runs")}
    del tree["data"]["source"]
    tree["data"]["sources"] = sources
    (root / "runs").mkdir()
    shutil.copy(migrated_store, root / "runs")
    run = root / "mixed.yaml"
    run.write_text(yaml.safe_dump(tree))
    with redirect_stdout(io.StringIO()) as out:
        assert main(["prepare", str(run), "--json"]) == 0
    return Prepared(root, run, texts, json.loads(out.getvalue()))


def test_prepare_leaves_shards_a_log_and_a_data_run(
    cli: Callable[..., Any], prepared: Prepared
) -> None:
    directory, facts = prepared.directory, prepared.facts
    output_dir = prepared.root / "runs"
    assert directory.parent == output_dir / "data"
    assert facts["source_kinds"] == KINDS
    assert facts["tokenized"]["tokens_per_second"] > 0
    events = read_events(directory / "events.jsonl")
    assert [event.kind for event in events][0 :: len(events) - 1] == ["start", "finish"]
    last = [event for event in events if event.kind == "prepare"][-1]
    assert last.metrics["data/tokens"] == sum(facts["tokens"].values())

    with connected(default_uri(output_dir), print) as client:
        experiment = client.get_experiment_by_name("tandem/data")
        (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["data/documents"] == 3 * NUM_DOCUMENTS
    *files, shards = [given.dataset for given in run.inputs.dataset_inputs]
    assert {file.name for file in files} == {"novels.jsonl", "peps.jsonl", "code.parquet"}
    assert shards.digest == directory.name
    assert cli("sync", output_dir, "--json").tree["num_points"] == 0


def test_inspect_shows_documents_of_every_source(
    cli: Callable[..., Any], prepared: Prepared
) -> None:
    facts = cli("inspect", prepared.directory, "--samples", "60", "--json").tree
    assert len(facts["samples"]) == facts["documents"]["train"]
    assert {sample["source"] for sample in facts["samples"]} == set(KINDS)
    for sample in facts["samples"]:
        assert any(text.startswith(sample["text"]) for text in prepared.texts[sample["source"]])
    page = cli("inspect", prepared.directory).out
    assert f"{facts['tokens']['train']:,}" in page
    assert "median" in page


def test_other_weights_reuse_the_shards_and_a_run_sees_each_source_by_its_weight(
    cli: Callable[..., Any], prepared: Prepared
) -> None:
    log = read_events(prepared.directory / "events.jsonl")
    weights = "data.mixture.weights={novels: 2, peps: 1, code: 1}"
    again = cli("prepare", prepared.run, weights)
    assert (again.code, "reusing" in again.out) == (0, True)
    assert [path.parent for path in prepared.root.rglob("manifest.json")] == [prepared.directory]
    assert read_events(prepared.directory / "events.jsonl") == log

    switches = [
        f"train.documents.{name}=true"
        for name in ("reset_positions", "mask_attention", "reset_state")
    ]
    trained = cli("train", prepared.run, weights, *switches, "--launcher", "local")
    assert trained.code == 0, trained.err
    result = read_result(prepared.root / "runs" / "tiny")
    # 6 steps of 4 samples, at shares of 1/2, 1/4 and 1/4.
    assert {name: read.samples for name, read in result.sources.items()} == {
        "novels": 12, "peps": 6, "code": 6,
    }  # fmt: skip
