"""A study runs each cell once, goes on after a failure, and refuses a foreign directory."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import DataConfig
from pipeline.config.study import StudyConfig
from pipeline.config.tree import merge
from pipeline.data.shards import ShardManifest
from pipeline.errors import ConfigError, DataError, LaunchError
from pipeline.study.execute import report_study, run_study
from pipeline.study.plan import plan_study
from pipeline.study.progress import StudyEvent
from pipeline.study.timeline import read_timeline
from pipeline.tracking.store import Verdict
from tests.study.conftest import finish_cell

NAMES = ["gpt-seed0", "lstm_attention-seed0", "step_time-w2", "model_state-w1", "model_state-w2"]


@dataclass
class RecordingLauncher:
    """Leaves what ranks would leave, and remembers what it was asked for."""

    study: StudyConfig
    manifest: ShardManifest
    fails: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    started: list[tuple[str, int]] = field(default_factory=list)

    def run(
        self, run_dir: Path, *, num_workers: int, stop_after_steps: int | None = None
    ) -> Verdict:
        self.started.append((run_dir.name, num_workers))
        if run_dir.name in self.fails:
            raise LaunchError("rank 1 was killed")
        if run_dir.name in self.stops:
            return "stopped"
        if run_dir.name not in self.silent:
            cell = next(c for c in plan_study(self.study).cells if c.name == run_dir.name)
            finish_cell(run_dir, cell, self.manifest, 0.2)
        return "complete"

    def command(self, run_dir: Path, *, num_workers: int) -> list[str]:
        return ["run", str(run_dir)]


@dataclass
class Prepared:
    """Finds the text prepared, and counts how often it was asked."""

    manifest: ShardManifest
    num_calls: int = 0

    def __call__(self, data: DataConfig) -> ShardManifest:
        self.num_calls += 1
        return self.manifest


@pytest.fixture
def launcher(study_config: StudyConfig, manifest: ShardManifest) -> RecordingLauncher:
    return RecordingLauncher(study_config, manifest)


@pytest.fixture
def prepared(manifest: ShardManifest) -> Prepared:
    return Prepared(manifest)


def directory_of(study: StudyConfig) -> Path:
    return study.output_dir / study.name


def test_every_cell_runs_once_at_its_world_size_and_text_is_prepared_once(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    result = run_study(study_config, launcher, prepare=prepared)
    assert result.status == "complete"
    assert launcher.started == list(zip(NAMES, [2, 2, 2, 1, 2], strict=True))
    assert prepared.num_calls == 1
    directory = directory_of(study_config)
    tree = json.loads((directory / "result.json").read_text())
    assert tree["status"] == "complete"
    assert set(tree["summaries"]) == {"gpt", "lstm_attention"}
    for name in ("report.html", "report.md", "study.yaml", "figures"):
        assert (directory / name).exists()
    for name in NAMES:
        assert (directory / "runs" / name / "environment.json").exists()


def test_a_second_call_runs_nothing_again(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    first = run_study(study_config, launcher, prepare=prepared)
    again = RecordingLauncher(study_config, launcher.manifest)
    events: list[StudyEvent] = []
    second = run_study(study_config, again, prepare=prepared, on_event=events.append)
    assert again.started == []
    assert [e.cell for e in events if e.outcome == "skipped"] == NAMES
    assert second.families == first.families


def test_a_failed_cell_is_listed_the_others_run_and_a_later_call_makes_up_for_it(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    launcher.fails = ("lstm_attention-seed0", "model_state-w1")
    result = run_study(study_config, launcher, prepare=prepared)
    assert result.status == "partial"
    assert set(result.missing) == set(launcher.fails)
    assert [name for name, _ in launcher.started] == NAMES
    report = (directory_of(study_config) / "report.md").read_text()
    assert "Cell lstm_attention-seed0 has no result: rank 1 was killed" in report
    again = RecordingLauncher(study_config, launcher.manifest)
    assert run_study(study_config, again, prepare=prepared).status == "complete"
    assert [name for name, _ in again.started] == list(launcher.fails)


def test_ranks_that_leave_no_result_count_as_failed(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    launcher.silent = ("gpt-seed0",)
    result = run_study(study_config, launcher, prepare=prepared)
    assert result.missing == {"gpt-seed0": "the ranks ended well but left no result.json"}


def test_a_stop_on_request_starts_no_further_cell(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    launcher.stops = ("lstm_attention-seed0",)
    result = run_study(study_config, launcher, prepare=prepared)
    assert result.status == "stopped"
    assert [name for name, _ in launcher.started] == NAMES[:2]
    assert (directory_of(study_config) / "report.html").exists()


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_stop_request_that_reached_no_run_starts_no_further_cell(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared, done: int
) -> None:
    result = run_study(
        study_config,
        launcher,
        prepare=prepared,
        should_stop=lambda: len(launcher.started) >= done,
    )
    assert result.status == "stopped"
    assert [name for name, _ in launcher.started] == NAMES[:done]
    assert set(result.missing) == set(NAMES[done:])
    assert (directory_of(study_config) / "report.html").exists()
    assert sorted(path.name for path in (directory_of(study_config) / "runs").glob("*")) == sorted(
        NAMES[:done]
    )
    again = RecordingLauncher(study_config, launcher.manifest)
    assert run_study(study_config, again, prepare=prepared).status == "complete"
    assert [name for name, _ in again.started] == NAMES[done:]


def test_a_stop_request_after_the_last_cell_leaves_a_complete_study(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    result = run_study(
        study_config,
        launcher,
        prepare=prepared,
        should_stop=lambda: len(launcher.started) == len(NAMES),
    )
    assert result.status == "complete"


def test_events_count_every_step_and_expect_less_and_less(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    events: list[StudyEvent] = []
    run_study(study_config, launcher, prepare=prepared, on_event=events.append)
    begins = [e for e in events if e.kind == "begin"]
    assert [e.index for e in begins] == list(range(1, 8))
    assert {e.total for e in events} == {7}
    assert [e.phase for e in begins] == ["prepare", "train", "train", *["probe"] * 3, "report"]
    assert all(e.expected_seconds is not None for e in begins if e.cell)
    assert begins[-1].remaining_seconds == 0.0
    steps = read_timeline(directory_of(study_config))
    assert [step.phase for step in steps] == [e.phase for e in begins]


def test_only_probes_run_in_quiet(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    quiet_during: list[str] = []

    @contextmanager
    def quiet() -> Iterator[None]:
        before = len(launcher.started)
        yield
        quiet_during.extend(name for name, _ in launcher.started[before:])

    run_study(study_config, launcher, prepare=prepared, quiet=quiet)
    assert quiet_during == NAMES[2:]


def changed(config: StudyConfig, **fields: Any) -> StudyConfig:
    return StudyConfig.model_validate({**config.model_dump(), **fields})


def test_a_cell_of_another_config_is_refused_before_anything_is_prepared(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    run_study(study_config, launcher, prepare=prepared)
    other = changed(study_config, base={**study_config.base, "precision": "bf16"})
    with pytest.raises(ConfigError, match="gpt-seed0 holds a cell of another config"):
        run_study(other, launcher, prepare=prepared)
    assert prepared.num_calls == 1


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": {"vocab_size": 10}}, ConfigError, "model.vocab_size=10 is smaller"),
        (
            {"train": {"global_batch_tokens": 2**20, "total_tokens": 2**20}},
            DataError,
            "fewer than one global batch",
        ),
        (
            {"train": {"micro_batch_samples": 1, "sequence_tokens": 2**10,
                       "global_batch_tokens": 2**11, "total_tokens": 2**11}},
            DataError,
            "the validation split has",
        ),
    ],
)  # fmt: skip
def test_text_that_a_family_cannot_use_is_refused_before_any_rank_starts(
    study_config: StudyConfig,
    launcher: RecordingLauncher,
    prepared: Prepared,
    fields: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    families = {label: merge(own, fields) for label, own in study_config.families.items()}
    study = changed(study_config, families=families)
    with pytest.raises(error, match=rf"families\.gpt: .*{message}"):
        run_study(study, launcher, prepare=prepared)
    assert launcher.started == []
    assert not (directory_of(study_config) / "runs").exists()


def test_a_probe_cell_with_other_arguments_is_refused(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    run_study(study_config, launcher, prepare=prepared)
    tree = study_config.model_dump()
    tree["probes"][0]["params"]["repeats"] = 99
    with pytest.raises(ConfigError, match="step_time-w2 holds a cell of another config"):
        run_study(StudyConfig.model_validate(tree), launcher, prepare=prepared)


def test_a_cell_finished_on_other_text_is_refused(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    run_study(study_config, launcher, prepare=prepared)
    prepared.manifest = launcher.manifest.model_copy(update={"fingerprint": "e" * 16})
    with pytest.raises(DataError, match="was finished on data f+, which is now e+"):
        run_study(study_config, launcher, prepare=prepared)


def test_an_unfinished_study_holds_no_result_that_a_watcher_could_take_for_its_end(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    run_study(study_config, launcher, prepare=prepared)
    path = directory_of(study_config) / "result.json"
    seen: list[bool] = []
    (directory_of(study_config) / "runs" / "model_state-w1" / "result.json").unlink()
    run_study(
        study_config, launcher, prepare=prepared, on_event=lambda event: seen.append(path.exists())
    )
    assert seen[:-1] == [False] * (len(seen) - 1)
    assert path.exists()


def test_a_reader_meets_every_config_whole(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared
) -> None:
    """A file written by rename is a new one: a reader keeps what it opened."""
    launcher.silent = tuple(NAMES)
    run_study(study_config, launcher, prepare=prepared)
    directory = directory_of(study_config)
    paths = [directory / "study.yaml", *directory.glob("runs/*/*.yaml")]
    assert len(paths) == 1 + len(NAMES)
    with ExitStack() as stack:
        streams = [stack.enter_context(path.open("rb")) for path in paths]
        run_study(study_config, launcher, prepare=prepared)
        for path, stream in zip(paths, streams, strict=True):
            assert os.fstat(stream.fileno()).st_nlink == 0, path
    assert list(directory.rglob("*.tmp")) == []


def test_a_moved_study_is_reported_where_it_stands(
    study_config: StudyConfig, launcher: RecordingLauncher, prepared: Prepared, tmp_path: Path
) -> None:
    result = run_study(study_config, launcher, prepare=prepared)
    moved = directory_of(study_config).rename(tmp_path / "elsewhere")
    (moved / "report.html").unlink()
    assert report_study(moved).families == result.families
    assert (moved / "report.html").exists()
