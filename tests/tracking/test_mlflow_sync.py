import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import TrackingError
from pipeline.tracking.events import read_events, surviving_events
from pipeline.tracking.mlflow_client import default_uri
from pipeline.tracking.mlflow_sync import follow, resolve_uri, sync
from pipeline.tracking.mlflow_ui import ui_url
from tests.tracking.mlflow_store import Store

pytestmark = pytest.mark.slow


def test_a_second_sync_sends_nothing(make_study: Callable[[], Path], store: Store) -> None:
    study_dir = make_study()
    assert sync(study_dir) > 500
    before = store.count()
    assert sync(study_dir) == 0
    assert store.count() == before
    assert len(store.runs()) == 8


def test_points_equal_the_event_log(make_study: Callable[[], Path], store: Store) -> None:
    study_dir = make_study()
    sync(study_dir)
    for name in ("gpt-seed0", "lstm_attention-seed1"):
        run = store.runs()[name]
        events = read_events(study_dir / "runs" / name / "events.jsonl")
        for metric in ("train/loss", "eval/bits_per_byte", "perf/tokens_per_second"):
            logged = [(e.step, e.metrics[metric]) for e in events if metric in e.metrics]
            assert store.points(run, metric) == logged
        history = store.client.get_metric_history(run.info.run_id, "train/loss")
        times = {
            e.step: round(e.time_unix_seconds * 1000) for e in events if "train/loss" in e.metrics
        }
        assert {metric.step: metric.timestamp for metric in history} == times


def test_children_carry_parent_tags_params_and_verdict(
    make_study: Callable[[], Path], store: Store
) -> None:
    sync(make_study())
    runs = store.runs()
    parent = runs.pop("tiny")
    assert "gpt reaches a lower loss" in parent.data.tags["mlflow.note.content"]
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
    run = runs["lstm_attention-seed1"]
    expected = {
        "study": "tiny",
        "family": "lstm_attention",
        "zero_stage": "1",
        "world_size": "2",
        "precision": "fp32",
        "seed": "1",
        "git_commit": "0" * 40,
        "status": "finished",
    }
    assert expected.items() <= run.data.tags.items()
    assert run.data.params["model.width"] == "64"
    assert run.data.params["num_parameters.non_embedding"] == "200000"
    assert run.info.end_time - run.info.start_time == 60_000
    assert run.data.metrics["result/memory_peak_bytes"] == 9e8
    assert store.points(run, "memory/rank_optimizer_bytes") == [(0, 1980000.0), (1, 1980000.0)]
    assert len(store.points(run, "eval/position_loss")) == 64


def test_the_step_of_a_summary_is_its_axis(make_study: Callable[[], Path], store: Store) -> None:
    study_dir = make_study()
    sync(study_dir)
    summaries = json.loads((study_dir / "result.json").read_text())["summaries"]
    for family, rows in summaries.items():
        run = store.runs()[f"scaling: {family}"]
        for metric in ("scaling/step_seconds", "scaling/loss"):
            written = [(r["step"], r["value"]) for r in rows if r["metric"] == metric]
            assert store.points(run, metric) == written
        assert (
            "| `scaling/step_seconds` | sequence tokens |" in run.data.tags["mlflow.note.content"]
        )


def test_a_changed_summary_takes_the_place_of_the_old_one(
    make_study: Callable[[], Path], store: Store
) -> None:
    study_dir = make_study()
    sync(study_dir)
    result = json.loads((study_dir / "result.json").read_text())
    result["summaries"]["gpt"] = [{"metric": "scaling/loss", "step": 300_000, "value": 3.0}]
    (study_dir / "result.json").write_text(json.dumps(result))
    sync(study_dir)
    run = store.runs()["scaling: gpt"]
    assert store.points(run, "scaling/loss") == [(300_000, 3.0)]
    assert list(run.data.metrics) == ["scaling/loss"]


def test_the_dataset_has_the_digest_of_the_manifest(
    make_study: Callable[[], Path], store: Store
) -> None:
    sync(make_study())
    (given,) = store.runs()["gpt-seed0"].inputs.dataset_inputs
    assert given.dataset.digest == "f" * 36
    assert json.loads(given.dataset.profile)["train_tokens"] == 1000
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_artifacts_stand_beside_the_store_and_follow_changes(
    make_study: Callable[[], Path], store: Store
) -> None:
    study_dir = make_study()
    sync(study_dir)
    parent = store.runs()["tiny"]
    assert store.text(parent, "report.html") == (study_dir / "report.html").read_text()
    location = study_dir.parent / "mlartifacts" / "tandem-tiny"
    assert parent.info.artifact_uri.startswith(location.as_uri())
    (study_dir / "report.html").write_text("<html>new</html>")
    sync(study_dir)
    assert store.text(store.runs()["tiny"], "report.html") == "<html>new</html>"
    child = store.runs()["gpt-seed0"]
    for name in ("run.yaml", "environment.json", "result.json"):
        assert store.text(child, name) == (study_dir / "runs" / "gpt-seed0" / name).read_text()


def test_probe_records_are_a_table(make_study: Callable[[], Path], store: Store) -> None:
    sync(make_study())
    run = store.runs()["step_time-2ranks"]
    table = json.loads(store.text(run, "step_time.json"))
    assert table["columns"] == ["family", "sequence_tokens", "step_seconds"]
    assert table["data"][0] == ["gpt", 64, [0.1, 0.11]]
    assert len(table["data"]) == 6
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "step_time.json", "type": "table"}
    ]


def test_a_crash_before_the_bookkeeping_repeats_no_point(
    make_study: Callable[[], Path], store: Store
) -> None:
    study_dir = make_study()
    sync(study_dir)
    before, ids = store.count(), {n: r.info.run_id for n, r in store.runs().items()}
    for run in store.runs().values():
        state = json.loads(run.data.tags["tandem.sync"])
        new = {key: state[key] for key in ("slot", "key", "first_child")}
        store.client.set_tag(run.info.run_id, "tandem.sync", json.dumps(new))
    sync(study_dir)
    assert store.count() == before
    assert {n: r.info.run_id for n, r in store.runs().items()} == ids


def test_a_study_that_moved_keeps_its_runs(make_study: Callable[[], Path], store: Store) -> None:
    study_dir = make_study()
    sync(study_dir)
    before = store.count()
    moved = study_dir.rename(study_dir.parent / "elsewhere")
    assert sync(moved) == 0
    assert store.count() == before


def test_a_growing_run_is_sent_bit_by_bit(make_run: Callable[..., object], store: Store) -> None:
    run = make_run().add("start", 0).add_steps(10, 50)
    sync(run.path)
    first = store.runs("tandem/runs")["alone"]
    assert (first.info.status, first.info.end_time) == ("RUNNING", None)
    run.add_steps(60, 200)
    sync(run.path)
    run.finish()
    sync(run.path)
    last = store.runs("tandem/runs")["alone"]
    assert last.info.run_id == first.info.run_id
    assert last.info.status == "FINISHED"
    assert [step for step, _ in store.points(last, "train/loss")] == list(range(10, 201, 10))
    assert "3.6" in last.data.tags["mlflow.note.content"]


def test_a_rewound_run_shows_surviving_points_only(
    make_run: Callable[..., object], store: Store
) -> None:
    run = make_run().add("start", 0).add_steps(10, 100)
    sync(run.path)
    killed = store.runs("tandem/runs")["alone"]
    run.add("resume", 50, attempt=2).add_steps(60, 200, attempt=2).finish(attempts=2)
    sync(run.path)
    shown = store.runs("tandem/runs")["alone"]
    survivors = surviving_events(read_events(run.path / "events.jsonl"))
    steps = [event.step for event in survivors if event.kind == "train"]
    assert [step for step, _ in store.points(shown, "train/loss")] == steps
    assert store.points(shown, "progress/attempt") == [(0, 1.0), (50, 2.0)]
    assert store.client.get_run(killed.info.run_id).info.lifecycle_stage == "deleted"
    assert sync(run.path) == 0


def test_a_run_stopped_and_resumed_where_it_stopped_stays_the_same_run(
    make_run: Callable[..., object], store: Store
) -> None:
    run = make_run().add("start", 0).add_steps(10, 100).add("stop", 100)
    (run.path / "stopped.json").write_text("{}")
    sync(run.path)
    stopped = store.runs("tandem/runs")["alone"]
    assert stopped.info.status == "KILLED"
    (run.path / "stopped.json").unlink()
    run.add("resume", 100, attempt=2).add_steps(110, 200, attempt=2).finish(attempts=2)
    sync(run.path)
    finished = store.runs("tandem/runs")["alone"]
    assert finished.info.run_id == stopped.info.run_id
    assert finished.info.status == "FINISHED"
    assert len(store.points(finished, "train/loss")) == 20


def test_a_study_run_anew_in_the_same_place_is_a_new_study(
    make_study: Callable[[], Path], make_run: Callable[..., object], store: Store
) -> None:
    study_dir = make_study()
    sync(study_dir)
    old = store.runs()["tiny"].info.run_id
    for log in study_dir.glob("runs/*/events.jsonl"):
        log.write_text(
            log.read_text().replace('"time_unix_seconds": 17', '"time_unix_seconds": 18')
        )
    for result in study_dir.glob("runs/*-2ranks/result.json"):
        result.write_text(result.read_text().replace(": 17", ": 18"))
    sync(study_dir)
    runs = store.client.search_runs(
        [store.client.get_experiment_by_name("tandem/tiny").experiment_id]
    )
    parents = [run.info.run_id for run in runs if run.data.tags["role"] == "study"]
    assert len(parents) == 2
    assert old in parents
    assert len(runs) == 16


def test_numbers_that_are_not_finite_arrive(make_run: Callable[..., object], store: Store) -> None:
    run = make_run().add("start", 0).add("skip", 1, train_loss=float("nan"))
    sync(run.path)
    ((step, value),) = store.points(store.runs("tandem/runs")["alone"], "train/loss")
    assert step == 1
    assert value != value


def test_the_uri_comes_from_the_call_then_the_config_then_the_directory(
    make_run: Callable[..., object], make_study: Callable[[], Path], tmp_path: Path
) -> None:
    run = make_run(tracking={"uri": "http://tracker.example"})
    assert resolve_uri(run.path, "http://other.example") == "http://other.example"
    assert resolve_uri(run.path, None) == "http://tracker.example"
    assert resolve_uri(make_study(), None) == default_uri(tmp_path / "runs")
    assert resolve_uri(tmp_path / "runs", None) == default_uri(tmp_path / "runs")
    assert resolve_uri(run.path, "sqlite:///x.db") == f"sqlite:///{Path.cwd()}/x.db"


def test_a_store_that_cannot_be_opened_fails_at_once(make_run: Callable[..., object]) -> None:
    run = make_run().add("start", 0)
    (run.path.parent / "mlflow.db").write_text("this is no database" * 100)
    with pytest.raises(TrackingError, match=r"cannot open the tracking store .*mlflow\.db"):
        sync(run.path)


def test_following_ends_with_everything_sent(make_run: Callable[..., object], store: Store) -> None:
    run = make_run().add("start", 0).add_steps(10, 50)
    asked = iter([False, False, True, True])
    said: list[str] = []
    is_up = follow(
        run.path, interval_seconds=0.01, should_stop=lambda: next(asked), on_event=said.append
    )
    assert (is_up, said) == (True, [])
    assert store.runs("tandem/runs")["alone"].info.status == "FAILED"


def test_a_sync_prints_nothing_and_leaves_the_working_directory_alone(
    make_study: Callable[[], Path], tmp_path: Path
) -> None:
    study_dir, elsewhere = make_study(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import sys, pathlib; from pipeline.tracking.mlflow_sync import sync; "
    code += "sync(pathlib.Path(sys.argv[1]), on_event=lambda text: print('said:', text))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(study_dir)],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("said: creating the tracking store")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert list(elsewhere.iterdir()) == []


def test_the_pages_open_on_the_newest_runs(make_study: Callable[[], Path], store: Store) -> None:
    study_dir = make_study()
    sync(study_dir)
    experiment = store.client.get_experiment_by_name("tandem/tiny").experiment_id
    url = ui_url(default_uri(study_dir.parent), 5000)
    assert url.startswith(f"http://127.0.0.1:5000/#/experiments/{experiment}/runs")
