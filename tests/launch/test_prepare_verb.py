"""`prepare` from its command line to its log, its run in MLflow and the page of `inspect`."""

from pathlib import Path

import pytest

from pipeline.tracking.events import read_events
from pipeline.tracking.mlflow_client import connected, default_uri

pytestmark = pytest.mark.slow


def test_prepare_leaves_shards_a_log_a_data_run_and_a_page(
    cli, tiny_run: Path, tmp_path: Path
) -> None:
    prepared = cli("prepare", tiny_run, f"output_dir={tmp_path}", "--json").tree
    directory = Path(prepared["directory"])
    assert directory.parent == tmp_path / "data"
    events = read_events(directory / "events.jsonl")
    assert [event.kind for event in events] == ["start", "prepare", "finish"]
    assert events[1].metrics["data/tokens"] == sum(prepared["tokens"].values())
    assert prepared["tokenized"]["tokens_per_second"] > 0

    with connected(default_uri(tmp_path), print) as client:
        experiment = client.get_experiment_by_name("tandem/data")
        (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["data/documents"] == 60
    (source, shards) = run.inputs.dataset_inputs
    assert (source.dataset.name, shards.dataset.digest) == ("text.jsonl", directory.name)
    assert cli("sync", tmp_path, "--json").tree["num_points"] == 0

    again = cli("prepare", tiny_run, f"output_dir={tmp_path}")
    assert (again.code, "reusing" in again.out) == (0, True)
    assert read_events(directory / "events.jsonl") == events

    facts = cli("inspect", directory, "--samples", "60", "--json").tree
    text = (tiny_run.parent / "text.jsonl").read_text()
    assert len(facts["samples"]) == facts["documents"]["train"]
    assert all(f'"text": "{sample["text"]}' in text for sample in facts["samples"])
    page = cli("inspect", directory).out
    assert f"{facts['tokens']['train']:,}" in page
    assert "median" in page
