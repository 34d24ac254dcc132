"""Input that is too large or interrupted: a document of 2 GB (F11), a Ray that dies (F21)."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT_BYTES = 2 << 30
LIMIT_BYTES = 10 << 20
"""Of a document that is kept."""
MEMORY_BYTES = 512 << 20
"""Far below the document; the limit of a document and what reading takes beside it."""

READ = """
import json, sys
from pathlib import Path
from pipeline.config.data import DataConfig
from pipeline.data.sources import build_sources, plan_splits
from pipeline.data.split_reader import SplitReader

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

data = DataConfig.model_validate(json.loads(sys.argv[1]))
sources = build_sources(data)
before, ids, reasons = peak_bytes(), [], {}
for split in plan_splits(sources):
    reader = SplitReader(split, data, sources[split.source])
    ids += [document.id for _, document in reader.documents()]
    for reason, number in reader.counts.quarantined.items():
        reasons[reason] = reasons.get(reason, 0) + number
print(json.dumps({"ids": ids, "reasons": reasons, "bytes": peak_bytes() - before}))
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("is_escaped", [False, True])
def test_f11_document_of_two_gigabytes(tmp_path: Path, is_escaped: bool) -> None:
    path = tmp_path / "large.jsonl"
    part = b"\\u0078" * 2**18 if is_escaped else b"x" * 2**20
    with path.open("wb") as stream:
        stream.write(b'{"id": "before", "text": "good words"}\n{"id": "large", "text": "')
        while stream.tell() < DOCUMENT_BYTES:
            stream.write(part)
        stream.write(b'"}\n{"id": "behind", "text": "good words"}\n')
    data = {
        "source": {"kind": "jsonl", "path": str(path)}, "output_dir": str(tmp_path / "out"),
        "on_bad_input": "quarantine", "max_document_bytes": LIMIT_BYTES,
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-c", READ, json.dumps(data)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    finally:
        path.unlink()
    seen = json.loads(done.stdout)
    assert seen["ids"] == ["before", "behind"]
    assert seen["reasons"] == {"too_large": 1}
    assert seen["bytes"] < MEMORY_BYTES


PREPARE = """
import sys
import psutil
from pipeline.config.data import DataConfig
from pipeline.data.prepare import prepare

def on_event(event):
    print(event.message, flush=True)
    if event.message.startswith("tokenized 1/4") and sys.argv[2] == "kill":
        children = psutil.Process().children(recursive=True)
        (raylet,) = [child for child in children if child.name() == "raylet"]
        raylet.kill()
        print("killed the raylet", flush=True)

prepare(DataConfig.model_validate_json(sys.argv[1]), on_event)
"""


def prepare_in_a_process(output_dir: Path, texts: Path, *, ending: str = "kept") -> tuple[int, str]:
    """Prepare files with a Ray of its own; give the exit code and what was shown."""
    data = {
        "source": {"kind": "jsonl", "path": str(texts)}, "output_dir": str(output_dir),
        "tokenizer": {"vocab_size": 300}, "validation_fraction": 0.2,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, json.dumps(data), ending],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_f21_raylet_killed_while_it_tokenizes(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abcd":
        lines = [json.dumps({"text": f"{name} {number} some words"}) for number in range(30)]
        # Files that weigh too much for one task.
        lines += [json.dumps({"text": " " * 1024})] * 40_000
        (texts / f"{name}.jsonl").write_text("\n".join(lines))
    code, shown = prepare_in_a_process(tmp_path / "prepared", texts, ending="kill")
    assert "killed the raylet" in shown
    assert code != 0
    assert not list((tmp_path / "prepared").rglob("manifest.json")), "taken for finished"
    code, shown = prepare_in_a_process(tmp_path / "prepared", texts)
    assert code == 0, shown
    assert re.search(r"going on: [1-3] of 4 splits are done", shown)
    assert prepare_in_a_process(tmp_path / "again", texts)[0] == 0
    assert contents(tmp_path / "prepared") == contents(tmp_path / "again")


def contents(output_dir: Path) -> dict[str, str]:
    """Hashes of the shards and the tokenizer of the one prepared directory here."""
    (directory,) = output_dir.glob("[0-9a-f]*")
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.suffix in (".bin", ".idx") or path.name == "tokenizer.json"
    }
