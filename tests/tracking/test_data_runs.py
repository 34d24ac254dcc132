"""A prepared directory becomes one MLflow run with its sources as inputs, however often it is sent.

The directories are written as preparing leaves them: a log, and the manifest last.
"""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import DataConfig, SourceConfig, SyntheticConfig
from pipeline.tracking.events import EventWriter
from pipeline.tracking.mlflow_client import default_uri
from pipeline.tracking.mlflow_sync import resolve_uri, sync
from pipeline.tracking.replica import Replica, ReplicaRun
from pipeline.tracking.replica_data import config_facts, read_shards
from pipeline.tracking.replica_study import plan_replicas
from tests.tracking.mlflow_store import Store

FINGERPRINT = "0123456789abcdef"
SHA256 = sha256(b"one").hexdigest()
WEB = SourceConfig(kind="jsonl", path="s3://me:canary1@bucket/web?token=canary2")
MANY = [{"name": f"part-{n:03}.jsonl", "bytes": "9", "version": f"v{n}"} for n in range(40)]
CONFIG = DataConfig(
    sources={
        "books": SourceConfig(kind="text", path="/corpus/books"),
        "web": WEB,
        "made": SourceConfig(kind="synthetic", synthetic=SyntheticConfig(num_documents=5)),
    }
)
CONTENTS: dict[str, Any] = {
    "books": [{"name": "emma.txt", "sha256": SHA256}],
    "web": MANY,
    "made": [],
}


class PreparedDirectory:
    """A prepared directory that can be written bit by bit."""

    def __init__(
        self, path: Path, config: DataConfig = CONFIG, contents: dict[str, Any] = CONTENTS
    ) -> None:
        self.path, self.config, self.contents = path, config, contents
        path.mkdir(parents=True)

    def attempt(self, first: int, last: int, ending: str | None = "finish", **values: Any) -> None:
        """Write an attempt that finds `first` splits done and does those up to `last`."""
        log = self.path / "events.jsonl"
        number = (
            1 if not log.exists() else json.loads(log.read_text().splitlines()[-1])["attempt"] + 1
        )
        with EventWriter(log, number) as events:
            events.write(
                "resume" if first else "start", first, {"config": config_facts(self.config)}
            )
            for step in range(first + 1, last + 1):
                left_out = {"dropped": {"short": step}, "quarantined": {"invalid_json": 1}}
                events.write("prepare", step, {"data/tokens": 100.0 * step, **left_out})
            if ending is not None:
                events.write(ending, last, values)

    def finish(self) -> None:
        record = {"tokens": 400, "documents": 4, "text_bytes": 1600, "shards": [{}]}
        options = {"made": {"kind": "synthetic", "synthetic": {"num_documents": 5}}}
        manifest = {
            "fingerprint": FINGERPRINT,
            "recipe": {"contents": self.contents, "sources": options},
            "vocab_size": 2048,
            "dtype": "uint16",
            "encoder": "fastokens",
            "encoder_version": "0.3.5",
            "splits": {"train": record},
        }
        (self.path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedDirectory:
    return PreparedDirectory(tmp_path / "runs" / "data" / FINGERPRINT)


def only(replicas: list[Replica]) -> ReplicaRun:
    ((run,),) = [replica.children for replica in replicas if replica.children]
    return run


def test_a_run_tells_its_recipe_and_no_credentials(prepared: PreparedDirectory) -> None:
    prepared.attempt(0, 4)
    prepared.finish()
    run = only(plan_replicas(prepared.path))
    assert run.name == f"books+web+made-{FINGERPRINT}"
    assert run.params["data.tokenizer.vocab_size"] == "2048"
    assert run.params["data.sources.web.path"] == "s3://***@bucket/web?token=***"
    assert (run.params["shards.encoder"], run.params["shards.dtype"]) == ("fastokens", "uint16")
    assert "canary" not in repr(run)
    assert "canary" not in (prepared.path / "events.jsonl").read_text()
    assert json.loads(run.texts["left_out.json"]) == {
        "columns": ["what", "reason", "number"],
        "data": [["dropped", "short", 4], ["quarantined", "invalid_json", 1]],
    }


def test_every_source_is_an_input_with_the_digest_of_its_files(
    prepared: PreparedDirectory,
) -> None:
    prepared.attempt(0, 4)
    prepared.finish()
    books, web, made, shards = only(plan_replicas(prepared.path)).datasets
    assert (books.name, books.digest, books.context) == ("emma.txt", SHA256[:36], "source")
    assert (books.source, books.profile) == ({"uri": "/corpus/books/emma.txt"}, {"num_files": 1})
    assert (web.name, web.source_type, web.profile) == ("web", "s3", {"num_files": 40})
    all_of_it = sha256(json.dumps(MANY, sort_keys=True).encode()).hexdigest()
    assert web.digest == all_of_it[:36]
    assert (made.name, made.source) == ("made", {"uri": "synthetic"})
    assert (shards.digest, shards.context) == (FINGERPRINT, "prepared")


@pytest.mark.parametrize(
    ("path", "names", "uris"),
    [
        ("/c/a.txt", ["a.txt"], ["/c/a.txt"]),
        ("/c/books/", ["x/a.txt"], ["/c/books/x/a.txt"]),
        ("/c/*/part-?.txt", ["x/part-1.txt"], ["/c/x/part-1.txt"]),
        ("*.txt", ["a.txt"], ["a.txt"]),
        ("s3://me:canary@b/c/*.txt", ["a.txt"], ["s3://***@b/c/a.txt"]),
        (
            ("/c/a.txt", "/d", "s3://me:canary@b/e/", "s3://me:canary@b/gone.txt"),
            ["0000/a.txt", "0001/a.txt", "0002/x/b.txt", "0003/s3://me:canary@b/gone.txt"],
            ["/c/a.txt", "/d/a.txt", "s3://***@b/e/x/b.txt", "s3://***@b/gone.txt"],
        ),
    ],
)
def test_every_file_is_named_by_where_it_stands(
    tmp_path: Path, path: str | tuple[str, ...], names: list[str], uris: list[str]
) -> None:
    contents = {"text": [{"name": name, "sha256": SHA256} for name in names]}
    config = DataConfig(source=SourceConfig(kind="text", path=path))
    prepared = PreparedDirectory(tmp_path / FINGERPRINT, config, contents)
    prepared.attempt(0, 1)
    prepared.finish()
    *files, _ = only(plan_replicas(prepared.path)).datasets
    assert [file.source for file in files] == [{"uri": uri} for uri in uris]


def test_shards_whose_place_is_not_known_have_none() -> None:
    shards = read_shards(DataConfig(), FINGERPRINT)
    assert shards is not None
    assert (shards.digest, shards.source) == (FINGERPRINT, {})


@pytest.mark.parametrize(
    ("ending", "reason", "status"),
    [
        ("finish", None, "FINISHED"),
        ("stop", "interrupted", "KILLED"),
        ("stop", "DataError: a.jsonl:3", "FAILED"),
        (None, None, "RUNNING"),
    ],
)
def test_the_log_and_the_manifest_decide_the_status(
    prepared: PreparedDirectory, ending: str | None, reason: str | None, status: str
) -> None:
    prepared.attempt(0, 2, ending, **({"reason": reason} if reason else {}))
    if ending == "finish":
        prepared.finish()
    assert only(plan_replicas(prepared.path)).status == status
    left_alone = only(plan_replicas(prepared.path, is_over=True)).status
    assert left_alone == ("FAILED" if status == "RUNNING" else status)


def test_an_output_directory_and_a_run_lead_to_their_data(
    prepared: PreparedDirectory, make_run: Callable[..., Any]
) -> None:
    prepared.attempt(0, 4)
    prepared.finish()
    run = make_run(data={"prepared_dir": str(prepared.path)}).add("start", 0)
    for root in (run.path, run.path.parent):
        replicas = plan_replicas(root)
        assert [replica.experiment for replica in replicas] == ["tandem/runs", "tandem/data"]
    assert resolve_uri(prepared.path, None) == default_uri(run.path.parent)


@pytest.mark.slow
def test_a_killed_and_resumed_preparation_is_one_run_whose_points_arrive_once(
    prepared: PreparedDirectory, store: Store
) -> None:
    prepared.attempt(0, 2, ending=None)
    assert sync(prepared.path) == 3
    first = only_run(store)
    assert (first.info.status, first.inputs.dataset_inputs) == ("RUNNING", [])
    prepared.attempt(2, 4)
    prepared.finish()
    assert sync(prepared.path) == 3
    assert sync(prepared.path) == 0
    assert sync(prepared.path.parent.parent) == 0
    run = only_run(store)
    assert (run.info.run_id, run.info.status) == (first.info.run_id, "FINISHED")
    assert store.points(run, "data/tokens") == [(n, 100.0 * n) for n in (1, 2, 3, 4)]
    assert store.points(run, "progress/attempt") == [(0, 1.0), (2, 2.0)]
    assert run.data.tags["role"] == "data"
    assert "| quarantined | invalid_json | 1 |" in run.data.tags["mlflow.note.content"]


@pytest.mark.slow
def test_the_data_run_and_a_training_run_share_the_digest(
    prepared: PreparedDirectory, store: Store, make_run: Callable[..., Any]
) -> None:
    prepared.attempt(0, 4)
    prepared.finish()
    run = make_run(data={"prepared_dir": str(prepared.path)}).add("start", 0)
    sync(run.path)
    made, trained = only_run(store), store.runs("tandem/runs")["alone"]
    assert [
        (given.dataset.name, given.tags[0].value) for given in made.inputs.dataset_inputs
    ] == [("emma.txt", "source"), ("web", "source"), ("made", "source"),
          ("books+web+made", "prepared")]  # fmt: skip
    (given,) = trained.inputs.dataset_inputs
    assert given.dataset.digest == made.inputs.dataset_inputs[-1].dataset.digest == FINGERPRINT
    for other in (made, trained):
        ids = [other.info.experiment_id]
        for search in (
            f"dataset.digest = '{FINGERPRINT}'", f"tags.data_fingerprint = '{FINGERPRINT}'"
        ):  # fmt: skip
            (found,) = store.client.search_runs(ids, filter_string=search)
            assert found.info.run_id == other.info.run_id


def only_run(store: Store) -> Any:
    (run,) = store.runs("tandem/data").values()
    return run
