import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import TrackingError
from pipeline.tracking.mlflow_client import default_uri, sqlite_path, sqlite_uri
from pipeline.tracking.mlflow_ui import ui_command
from pipeline.tracking.redaction import redact
from pipeline.tracking.replica import ReplicaRun
from pipeline.tracking.replica_study import plan_replicas
from pipeline.tracking.store import write_stopped


def plan_single(run: object, is_over: bool = False) -> ReplicaRun:
    ((child,),) = [replica.children for replica in plan_replicas(run.path, is_over)]
    return child


def test_planning_twice_gives_the_same_replica(make_study: Callable[[], Path]) -> None:
    study_dir = make_study()
    assert plan_replicas(study_dir) == plan_replicas(study_dir)


def test_a_study_has_a_child_per_cell_and_a_summary_per_family(
    make_study: Callable[[], Path],
) -> None:
    (replica,) = plan_replicas(make_study())
    assert replica.parent is not None
    assert replica.parent.status == "FINISHED"
    assert "gpt reaches a lower loss" in replica.parent.note
    assert [(child.role, child.name) for child in replica.children] == [
        ("training", "gpt-seed0"),
        ("training", "gpt-seed1"),
        ("training", "lstm_attention-seed0"),
        ("training", "lstm_attention-seed1"),
        ("probe", "step_time-2ranks"),
        ("summary", "scaling: gpt"),
        ("summary", "scaling: lstm_attention"),
    ]


def test_a_study_without_a_result_runs_until_it_is_over(make_study: Callable[[], Path]) -> None:
    study_dir = make_study()
    (study_dir / "result.json").unlink()
    for is_over, status in ((False, "RUNNING"), (True, "FAILED")):
        (replica,) = plan_replicas(study_dir, is_over)
        assert replica.parent is not None
        assert replica.parent.status == status


def test_a_family_without_points_has_no_summary(make_study: Callable[[], Path]) -> None:
    study_dir = make_study()
    result = json.loads((study_dir / "result.json").read_text())
    result["summaries"]["gpt"] = []
    (study_dir / "result.json").write_text(json.dumps(result))
    (replica,) = plan_replicas(study_dir)
    names = [child.name for child in replica.children if child.role == "summary"]
    assert names == ["scaling: lstm_attention"]


def test_a_summary_with_an_unknown_metric_is_refused(make_study: Callable[[], Path]) -> None:
    study_dir = make_study()
    rows = [{"metric": "scaling/luck", "step": 1, "value": 1.0}]
    (study_dir / "result.json").write_text(json.dumps({"summaries": {"gpt": rows}}))
    with pytest.raises(TrackingError, match="unknown metric 'scaling/luck'"):
        plan_replicas(study_dir)


def test_an_output_directory_gives_its_studies_and_its_single_runs(
    make_study: Callable[[], Path], make_run: Callable[..., object]
) -> None:
    make_run("alone").add("start", 0)
    replicas = plan_replicas(make_study().parent)
    assert [replica.experiment for replica in replicas] == ["tandem/runs", "tandem/tiny"]
    assert [child.name for child in replicas[0].children] == ["alone"]


def test_the_verdict_decides_the_status(make_run: Callable[..., object]) -> None:
    run = make_run().add("start", 0)
    assert plan_single(run).status == "RUNNING"
    assert plan_single(run).end_unix_ms is None
    assert plan_single(run, is_over=True).status == "FAILED"
    write_stopped(run.path, 0, "asked to")
    assert plan_single(run).status == "KILLED"
    run.finish()
    assert plan_single(run).status == "FINISHED"


def test_a_run_that_left_no_event_is_passed_over(make_run: Callable[..., object]) -> None:
    (replica,) = plan_replicas(make_run().path)
    assert replica.children == ()


def test_the_load_of_hosts_stays_apart_and_is_rewound_with_the_run(
    make_run: Callable[..., object],
) -> None:
    run = make_run().add("start", 0).add_steps(10, 30)
    seconds = run.lines[-1]["time_unix_seconds"]
    for host, load in (("a.example", 0.5), ("b-2", 0.25)):
        lines = [
            {"seq": n, "attempt": 1, "kind": "system", "step": step,
             "time_unix_seconds": seconds, "values": {"system/cpu_fraction": load}}
            for n, step in enumerate((10, 30))
        ]  # fmt: skip
        log = run.path / f"events.{host}.jsonl"
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def loads() -> list[tuple[str, int, float]]:
        points = plan_single(run).points
        return [(p.name, p.step, p.value) for p in points if p.name.startswith("system/")]

    first = [("system/a.example/cpu_fraction", 10, 0.5), ("system/b-2/cpu_fraction", 10, 0.25)]
    late = [(name, 30, load) for name, _, load in first]
    assert sorted(loads()) == sorted(first + late)
    run.add("resume", 20, attempt=2)
    assert sorted(loads()) == first


def test_credentials_stay_on_this_machine(make_run: Callable[..., object]) -> None:
    run = make_run(
        tracking={"uri": "https://me:canary1@tracker.example/mlflow"},
        data={
            "source": {
                "kind": "text",
                "path": "https://me:canary2@data.example/x?token=canary3&part=1",
            },
            "tokenizer": {"path": "hf_canary4canary4canary4"},
        },
    ).add("start", 0)
    plan = plan_single(run)
    assert "canary" not in repr(plan)
    assert plan.params["data.source.path"] == "https://***@data.example/x?token=***&part=1"
    assert "https://***@tracker.example/mlflow" in plan.texts["run.yaml"]


def test_redaction_leaves_harmless_text_alone() -> None:
    text = "mail me@example.org, use_cls_token=true, https://example.org/a?page=2 s3://bucket/key"
    assert redact(text) == text


def test_an_sqlite_uri_leads_back_to_its_path() -> None:
    for text in ("/data/runs/mlflow.db", "/a b/100%/x?y#z.db"):
        assert sqlite_path(sqlite_uri(Path(text))) == Path(text)
    assert sqlite_path("http://127.0.0.1:5000") is None
    assert default_uri(Path("/data/runs")) == "sqlite:////data/runs/mlflow.db"


def test_the_pages_are_served_on_loopback_with_artifacts_beside_the_store(tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    with pytest.raises(TrackingError, match="there is no tracking store"):
        ui_command(uri, 5000)
    sqlite_path(uri).touch()
    command = ui_command(uri, 5000)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--artifacts-destination") + 1] == str(tmp_path / "mlartifacts")
    with pytest.raises(TrackingError, match=r"https://\*\*\*@tracker\.example is served already"):
        ui_command("https://me:pw@tracker.example", 5000)
