"""A document of 2 GB is left out by its size, in bounded memory, and its neighbours stay (F11)."""

import json
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
