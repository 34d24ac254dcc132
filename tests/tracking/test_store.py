import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import TrackingError
from pipeline.tracking.environment import collect_environment, write_environment
from pipeline.tracking.metrics import METRICS, result_name
from pipeline.tracking.store import (
    RunResult,
    clear_stopped,
    list_cells,
    measured,
    read_probes,
    read_result,
    read_runs,
    read_verdict,
    write_json_atomic,
    write_result,
    write_stopped,
)

CRASH = """
import os, sys
from pathlib import Path
from pipeline.tracking.store import write_json_atomic
sys.addaudithook(lambda event, arguments: os._exit(9) if event == "os.rename" else None)
write_json_atomic(Path(sys.argv[1]), {"new": 1})
"""
"""Dies between the writing of the temporary file and its rename."""


def test_metric_names_keep_to_their_alphabet() -> None:
    for name in [*METRICS, *map(result_name, METRICS)]:
        assert re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+", name), name


def test_a_json_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json_atomic(path, {"a": 1})
    write_json_atomic(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_that_dies_while_writing_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json_atomic(path, {"old": 1})
    died = subprocess.run([sys.executable, "-c", CRASH, str(path)], check=False)
    assert died.returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(TrackingError, match=r"cannot write .*result\.json"):
        write_json_atomic(path, {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_result_reads_back_as_written(make_run: Callable[..., object]) -> None:
    run = make_run()
    result = RunResult.model_validate(run.result())
    write_result(run.path, result)
    assert read_result(run.path) == result
    assert json.loads((run.path / "result.json").read_text())["schema_version"] == 1


def test_what_is_missing_is_absent_from_the_file(make_run: Callable[..., object]) -> None:
    run = make_run()
    tree = {k: v for k, v in run.result().items() if k not in ("per_position_loss", "git_commit")}
    write_result(run.path, RunResult.model_validate(tree))
    written = json.loads((run.path / "result.json").read_text())
    assert "per_position_loss" not in written
    assert "git_commit" not in written
    assert "spread" not in written["metrics"]["eval/loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "many"}, r"result\.json: steps: "),
        ({"extra": 1}, r"result\.json: extra: "),
        ({"status": "failed"}, r"result\.json: status: "),
        ({"model_state_bytes": [{"parameters": -1}]}, r"model_state_bytes\.0\.parameters: "),
        (
            {"metrics": {"eval/lossy": {"value": 1, "num": 1, "unit": "s"}}},
            r"'eval/lossy' is not a metric",
        ),
        (
            {"metrics": {"eval/loss": {"value": 1, "num": 1, "unit": "bits"}}},
            r"eval/loss is in nats/token, got unit 'bits'",
        ),
    ],
)
def test_a_malformed_result_names_file_and_field(
    make_run: Callable[..., object], change: dict[str, object], message: str
) -> None:
    run = make_run()
    (run.path / "result.json").write_text(json.dumps({**run.result(), **change}))
    with pytest.raises(TrackingError, match=message):
        read_result(run.path)


def test_a_cut_off_result_names_the_file(make_run: Callable[..., object]) -> None:
    run = make_run()
    (run.path / "result.json").write_text('{"schema_version": 1, "ru')
    with pytest.raises(TrackingError, match=r"result\.json: Invalid JSON"):
        read_result(run.path)


def test_a_measured_value_takes_the_unit_of_its_name() -> None:
    assert measured("perf/step_seconds", 0.2, num=5, spread=0.01).unit == "s"
    with pytest.raises(TrackingError, match="unknown metric"):
        measured("perf/speed", 1.0)
    with pytest.raises(TrackingError, match="perf/step_seconds: value"):
        measured("perf/step_seconds", float("inf"))


def test_the_verdict_follows_the_markers(make_run: Callable[..., object]) -> None:
    run = make_run()
    assert read_verdict(run.path) is None
    write_stopped(run.path, 5, "asked to")
    assert read_verdict(run.path) == "stopped"
    assert json.loads((run.path / "stopped.json").read_text())["step"] == 5
    clear_stopped(run.path)
    assert read_verdict(run.path) is None
    write_stopped(run.path, 5, "asked to")
    write_result(run.path, RunResult.model_validate(run.result()))
    assert read_verdict(run.path) == "complete"
    assert not (run.path / "stopped.json").exists()


def test_runs_of_a_study_are_sorted_and_unfinished_cells_are_listed(
    make_study: Callable[[], Path],
) -> None:
    study_dir = make_study()
    (study_dir / "runs" / "gpt-seed0" / "result.json").unlink()
    names = [record.result.run for record in read_runs(study_dir)]
    assert names == ["gpt-seed1", "lstm_attention-seed0", "lstm_attention-seed1"]
    assert [result.run for result in read_probes(study_dir)] == ["step_time-2ranks"]
    verdicts = {cell.name: cell.verdict for cell in list_cells(study_dir)}
    assert verdicts["gpt-seed0"] is None
    assert len(verdicts) == 5


def test_runs_directly_under_the_output_directory_are_found(
    make_run: Callable[..., object],
) -> None:
    run = make_run("alone").add("start", 0).finish()
    (record,) = read_runs(run.path.parent)
    assert (record.run_dir, record.config.name) == (run.path, "alone")
    assert read_runs(run.path) == [record]


def test_a_record_holds_the_surviving_events_only(make_run: Callable[..., object]) -> None:
    run = make_run().add("start", 0).add_steps(10, 30).add("resume", 10, attempt=2)
    run.add_steps(20, 20, attempt=2).finish(20, attempts=2)
    (record,) = read_runs(run.path)
    assert [(e.attempt, e.step) for e in record.events if e.kind == "train"] == [(1, 10), (2, 20)]


def test_the_environment_holds_versions_and_no_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-value")
    environment = write_environment(tmp_path, {"device": "cpu"})
    assert environment["device"] == "cpu"
    assert environment["packages"]["pydantic"]
    assert None not in collect_environment().values()
    assert "canary-value" not in (tmp_path / "environment.json").read_text()
