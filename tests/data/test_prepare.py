"""Preparation with a real Ray: same bytes however it runs, reuse, kills, errors from tasks."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import zstandard
from tokenizers import Tokenizer

import pipeline
from pipeline.config.data import DataConfig
from pipeline.data.indexed import read_index, token_dtype
from pipeline.data.make_shards import ShardJob, is_validation, make_shards
from pipeline.data.prepare import prepare
from pipeline.data.shards import ShardManifest, ShardSet, load_token_bytes
from pipeline.data.sources import build_sources, plan_splits
from pipeline.data.verification import verify_shards
from pipeline.errors import DataError

pytestmark = pytest.mark.slow

ROOT = Path(pipeline.__file__).parents[1]
Corpus = tuple[DataConfig, list[dict[str, str]]]

IN_ANOTHER_PROCESS = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pipeline.config.data import DataConfig
from pipeline.data.prepare import prepare
from pipeline.data.ray_tasks import ray_session

def on_event(event):
    if event.message.startswith("tokenized 1/") and {address!r}:
        os.kill(os.getpid(), signal.SIGKILL)

with ray_session({address!r}, num_cpus=1):
    import ray
    manifest = prepare(DataConfig.model_validate_json({config!r}), on_event)
assert not ray.is_initialized() and "RAY_AUTH_MODE" not in os.environ
print(manifest.model_dump_json())
"""


def run_elsewhere(
    place: Path, config: DataConfig, address: str | None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Prepare in a process that finds the package on its own `sys.path` alone."""
    code = IN_ANOTHER_PROCESS.format(
        root=str(ROOT), config=config.model_dump_json(), address=address
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_AUTH_MODE")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory,
    make_documents: Callable[[int], list[dict[str, str]]],
    write_jsonl: Callable[..., Path],
    make_config: Callable[..., DataConfig],
) -> Corpus:
    """60 documents in two files that weigh too much for one task, one of them blank."""
    root = tmp_path_factory.mktemp("corpus")
    documents = make_documents(60)
    documents[3]["text"] = " \n"
    documents[5]["text"] = "<|endoftext|> in the text"
    padding = [" " * 1024] * 40_000
    write_jsonl(root / "text" / "a.jsonl", [*documents[:30], *padding])
    write_jsonl(root / "text" / "b.jsonl", [*documents[30:], *padding])
    return make_config(root / "text", root / "prepared"), documents


@pytest.fixture(scope="module")
def prepared(local_ray: None, corpus: Corpus) -> tuple[ShardManifest, list[str]]:
    events: list[str] = []
    return prepare(corpus[0], lambda event: events.append(event.message)), events


def document_tokens(manifest: ShardManifest, split: str) -> list[list[int]]:
    """Give the tokens of each document of a split, by the lengths of the index files."""
    shards, position, documents = ShardSet(manifest, split), 0, []
    for shard in manifest.splits[split].shards:
        lengths = read_index(manifest.directory / f"{shard.name}.idx").lengths_tokens
        for length in lengths.tolist():
            documents.append(shards.tokens(position, position + length).tolist())
            position += length
    assert position == shards.num_tokens
    return documents


def test_every_document_comes_back_in_its_split_in_order(
    prepared: tuple[ShardManifest, list[str]], corpus: Corpus
) -> None:
    manifest, documents = prepared[0], corpus[1]
    tokenizer = Tokenizer.from_file(str(manifest.directory / "tokenizer.json"))
    kept = [d for d in documents if d["text"].strip()]
    held_out = [d["text"] for d in kept if is_validation(d["id"], 0.2)]
    trained_on = [d["text"] for d in kept if not is_validation(d["id"], 0.2)]
    for split, expected in (("train", trained_on), ("validation", held_out)):
        found = document_tokens(manifest, split)
        assert all(tokens[-1] == manifest.end_of_document_id for tokens in found)
        assert not any(manifest.end_of_document_id in tokens[:-1] for tokens in found)
        decoded = [tokenizer.decode(t[:-1], skip_special_tokens=False) for t in found]
        assert decoded == expected
        assert manifest.splits[split].text_bytes == sum(len(t.encode()) for t in expected)
    assert manifest.dropped_documents == {"empty": 1}


def test_bytes_of_all_tokens_are_the_bytes_of_all_documents(
    prepared: tuple[ShardManifest, list[str]],
) -> None:
    manifest = prepared[0]
    token_bytes = load_token_bytes(manifest.directory)
    assert token_bytes.shape == (manifest.vocab_size,)
    for split in ("train", "validation"):
        shards = ShardSet(manifest, split)
        total = token_bytes[shards.tokens(0, shards.num_tokens)].sum()
        assert total == manifest.splits[split].text_bytes


def test_two_ray_workers_write_the_bytes_that_one_process_writes(
    prepared: tuple[ShardManifest, list[str]], corpus: Corpus, tmp_path: Path
) -> None:
    manifest, config = prepared[0], corpus[0]
    job = ShardJob(
        data=config,
        directory=tmp_path,
        tokenizer_json=(manifest.directory / "tokenizer.json").read_text(),
        encoder="tokenizers",
        end_of_document_id=manifest.end_of_document_id,
        dtype=token_dtype(manifest.vocab_size),
    )
    splits = plan_splits(build_sources(config))
    results = [make_shards(split, job) for split in reversed(splits)][::-1]
    assert len(results) == 2
    for name, record in manifest.splits.items():
        expected = [s.model_copy(update={"encoder": "tokenizers"}) for s in record.shards]
        assert [result.shards[name] for result in results] == expected
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*-*")}
    assert len(written) == 8
    for name, data in written.items():
        assert (manifest.directory / name).read_bytes() == data


def test_shards_verify_and_events_say_what_ran(
    prepared: tuple[ShardManifest, list[str]],
) -> None:
    manifest, events = prepared
    verify_shards(manifest.directory)
    text = "\n".join(events)
    for part in ("training a byte-level BPE of 300", "encoder fastokens", "MB/s", "prepared "):
        assert part in text
    assert not list(manifest.directory.glob(".*"))


def test_a_finished_directory_is_reused_at_once_without_ray(
    prepared: tuple[ShardManifest, list[str]], corpus: Corpus
) -> None:
    code = (
        "import sys, time; from pipeline.config.data import DataConfig\n"
        "from pipeline.data.prepare import prepare\n"
        "started = time.perf_counter()\n"
        f"manifest = prepare(DataConfig.model_validate_json({corpus[0].model_dump_json()!r}))\n"
        "seconds = time.perf_counter() - started\n"
        "loaded = {'ray', 'tokenizers', 'fastokens', 'datasets', 'torch'} & set(sys.modules)\n"
        "print(manifest.fingerprint, seconds < 0.5, sorted(loaded))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split(maxsplit=1) == [prepared[0].fingerprint, "True []\n"], result.stderr


def test_prepared_dir_is_used_if_it_matches_and_refused_if_not(
    prepared: tuple[ShardManifest, list[str]], corpus: Corpus
) -> None:
    config = corpus[0].model_copy(update={"prepared_dir": prepared[0].directory})
    assert prepare(config) == prepared[0]
    other = config.model_copy(update={"validation_fraction": 0.3})
    with pytest.raises(DataError, match=r"validation_fraction: 0\.2, the config says 0\.3"):
        prepare(other)


def test_prepared_dir_is_used_where_the_text_is_gone(
    prepared: tuple[ShardManifest, list[str]], corpus: Corpus
) -> None:
    source = corpus[0].source.model_copy(update={"path": "/nowhere/at/all"})
    events: list[str] = []
    config = corpus[0].model_copy(update={"prepared_dir": prepared[0].directory, "source": source})
    assert prepare(config, lambda event: events.append(event.message)) == prepared[0]
    assert "is not compared" in events[0]


def test_a_manifest_of_another_recipe_is_an_error(
    local_ray: None,
    tmp_path: Path,
    corpus: Corpus,
    prepared: tuple[ShardManifest, list[str]],
) -> None:
    directory = tmp_path / prepared[0].fingerprint
    directory.mkdir()
    for path in prepared[0].directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"vocab_size": 300', '"vocab_size": 301'))
    with pytest.raises(DataError, match="was made from something else"):
        prepare(corpus[0].model_copy(update={"output_dir": tmp_path}))


def test_a_preparation_killed_on_a_cluster_is_not_taken_for_finished_and_goes_on(
    local_ray: None,
    tmp_path: Path,
    corpus: Corpus,
    prepared: tuple[ShardManifest, list[str]],
) -> None:
    config = corpus[0].model_copy(update={"output_dir": tmp_path / "prepared"})
    killed = run_elsewhere(tmp_path, config, ray.get_runtime_context().gcs_address)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (directory,) = config.output_dir.glob("[0-9a-f]*")
    assert list(directory.glob("*.bin"))
    assert not (directory / "manifest.json").exists()
    inodes = {path.name: path.stat().st_ino for path in directory.glob("*.bin")}
    events: list[str] = []
    manifest = prepare(config, lambda event: events.append(event.message))
    assert f"using the tokenizer that was trained before in {directory}/tokenizer.json" in events
    assert any(re.fullmatch(r"going on: [12] of 2 splits are done", event) for event in events)
    assert manifest == prepared[0].model_copy(update={"directory": directory})
    verify_shards(directory)
    kept = [name for name, inode in inodes.items() if (directory / name).stat().st_ino == inode]
    assert len(kept) >= 2, "the finished split was made again"
    names = {path.name for path in prepared[0].directory.iterdir()}
    assert {path.name for path in directory.iterdir()} == names


def test_a_bad_line_met_by_a_task_is_our_error_and_leaves_no_manifest(
    local_ray: None,
    tmp_path: Path,
    prepared: tuple[ShardManifest, list[str]],
    write_jsonl: Callable[..., Path],
    make_config: Callable[..., DataConfig],
) -> None:
    long = "word " * 20_000
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": f"{i} {long}"} for i in range(9)] + ["{"])
    tokenizer = str(prepared[0].directory / "tokenizer.json")
    config = make_config(path, tmp_path / "prepared", tokenizer={"path": tokenizer})
    started: list[str] = []
    with pytest.raises(DataError, match=r"^[^\n]*c\.jsonl:10: invalid JSON: [^\n]*$"):
        prepare(config, lambda event: started.append(event.message))
    assert "tokenizing the source, cut into 1" in started
    (directory,) = config.output_dir.glob("[0-9a-f]*")
    assert not (directory / "manifest.json").exists()
    assert not list(directory.glob("*-*"))


def test_a_local_ray_of_one_cpu_gives_the_same_shards_and_leaves_nothing_behind(
    prepared: tuple[ShardManifest, list[str]], corpus: Corpus, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    temporary = Path(tempfile.mkdtemp(prefix="r", dir=os.environ["TMPDIR"]))
    home.mkdir()
    config = corpus[0].model_copy(update={"output_dir": tmp_path / "prepared"})
    result = run_elsewhere(tmp_path, config, None, HOME=str(home), TMPDIR=str(temporary))
    assert (result.returncode, result.stderr) == (0, "")
    assert ShardManifest.model_validate_json(result.stdout).splits == prepared[0].splits
    assert list(temporary.iterdir()) == []
    assert not (home / ".ray").exists()


def test_texts_that_stood_earlier_are_dropped_by_reason_and_the_rest_is_as_without_them(
    local_ray: None,
    tmp_path: Path,
    make_documents: Callable[[int], list[dict[str, str]]],
    write_jsonl: Callable[..., Path],
    make_config: Callable[..., DataConfig],
) -> None:
    documents = make_documents(40)
    near = {"id": "near", "text": documents[7]["text"] + " the"}
    same = {"id": "same", "text": documents[3]["text"]}
    write_jsonl(tmp_path / "alone" / "a.jsonl", documents)
    alone = prepare(make_config(tmp_path / "alone", tmp_path / "out"))
    tokenizer = {"path": str(alone.directory / "tokenizer.json")}
    alone = prepare(make_config(tmp_path / "alone", tmp_path / "out", tokenizer=tokenizer))
    write_jsonl(tmp_path / "more" / "a.jsonl", [*documents, near, same])
    counts = {"exact": {"duplicate_text": 1}, "minhash": {"duplicate_text": 1, "near_duplicate": 1}}
    for kind, dropped in counts.items():
        clean = {"deduplicate": kind, "keep_dropped": True}
        config = make_config(tmp_path / "more", tmp_path / "out", tokenizer=tokenizer, clean=clean)
        manifest = prepare(config)
        assert manifest.dropped_documents == dropped
        assert manifest.input_documents == 42
        if kind == "minhash":
            for name, split in alone.splits.items():
                sums = [shard.sha256 for shard in manifest.splits[name].shards]
                assert sums == [shard.sha256 for shard in split.shards]
        (path,) = (manifest.directory / "dropped").iterdir()
        lines = zstandard.decompress(path.read_bytes(), max_output_size=1 << 20).splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["near", "same"][-len(dropped) :]


def test_filters_drop_by_their_reasons_before_documents_are_tokenized(
    local_ray: None,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    make_documents: Callable[[int], list[dict[str, str]]],
    make_config: Callable[..., DataConfig],
) -> None:
    documents = [*make_documents(10), {"id": "short", "text": "the of and to"}]
    write_jsonl(tmp_path / "a.jsonl", documents)
    clean = {"filters": ["gopher_quality"], "options": {"gopher_quality": {"min_stop_words": None}}}
    config = make_config(tmp_path / "a.jsonl", tmp_path / "out", clean=clean)
    manifest = prepare(config)
    assert set(manifest.dropped_documents) == {"gopher_quality:short_doc"}
    assert sum(split.documents for split in manifest.splits.values()) == 10
    assert manifest.recipe["clean"]["versions"].keys() == {"datatrove", "spacy"}


def test_a_text_survives_when_its_first_copy_has_an_id_that_was_given_before(
    local_ray: None,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    make_documents: Callable[[int], list[dict[str, str]]],
    make_config: Callable[..., DataConfig],
) -> None:
    unique = "the one and only text of its kind"
    documents = make_documents(12)
    documents += [{"id": "d0", "text": unique}, {"id": "new", "text": unique}]
    write_jsonl(tmp_path / "a.jsonl", documents)
    config = make_config(
        tmp_path / "a.jsonl",
        tmp_path / "out",
        clean={"deduplicate": "exact"},
        on_bad_input="quarantine",
    )
    manifest = prepare(config)
    assert manifest.quarantined_documents == {"duplicate_id": 1}
    assert manifest.dropped_documents == {}
    tokenizer = Tokenizer.from_file(str(manifest.directory / "tokenizer.json"))
    texts = [
        tokenizer.decode(tokens[:-1])
        for split in ("train", "validation")
        for tokens in document_tokens(manifest, split)
    ]
    assert texts.count(unique) == 1
    assert len(texts) == 13
    fields = {"sources": {"mine": config.source}, "output_dir": tmp_path / "o"}
    named = config.model_copy(update={**fields, "on_bad_input": "fail"})
    with pytest.raises(DataError, match=r"the id 'd0' .* \(data\.sources\.mine\.id_column=null\)"):
        prepare(named)


def test_a_split_made_again_leaves_no_shard_that_it_has_lost(
    local_ray: None,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    make_documents: Callable[[int], list[dict[str, str]]],
    make_config: Callable[..., DataConfig],
) -> None:
    documents = make_documents(30)
    held_out = next(d for d in documents if is_validation(d["id"], 0.2))
    padding = [" " * 1024] * 70_000
    write_jsonl(tmp_path / "text" / "a.jsonl", [*documents, *padding])
    others = [{"id": f"x{i}", "text": "sea"} for i in range(40)]
    kept = [d for d in others if not is_validation(d["id"], 0.2)]
    write_jsonl(tmp_path / "text" / "b.jsonl", [*kept, {**held_out, "text": "given again"}])
    manifest = prepare(make_config(tmp_path / "text", tmp_path / "out", on_bad_input="quarantine"))
    assert manifest.quarantined_documents == {"duplicate_id": 1}
    listed = {s.name for split in manifest.splits.values() for s in split.shards}
    assert len(listed) == 3
    assert {path.stem for path in manifest.directory.glob("*.bin")} == listed
    assert {path.stem for path in manifest.directory.glob("*.idx")} == listed
