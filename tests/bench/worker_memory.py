"""Peak resident memory of the processes that tokenize, whatever the corpus and its documents.

    python -m tests.bench.worker_memory --corpus DIR --tokenizer tokenizer.json [--gigabytes 1]

Each case prepares its own files in a fresh process with a Ray of its own and two workers, whose
VmHWM is read while they live: the corpus repeated to `--gigabytes`, as plain files and as zstd, so
splits of 64 MB; and one document of 200 MB among short ones, with `max_document_bytes` raised, of
English and of random Chinese characters (three bytes each, and more tokens than bytes / 2). The
exit code is 1 where a worker takes 1.5 GB or more.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import psutil

from tests.bench.corpora import CorpusDocument, cut_tiny, read_corpus, write_repeated

LIMIT_BYTES = 1_500_000_000
LONG_DOCUMENT_BYTES = 200_000_000
RAISED_BYTES = 256 << 20
SAMPLE_SECONDS = 0.05
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Files to prepare."""

    name: str
    write: Callable[[Path], object]
    """Writes them into a directory that it makes."""


def main() -> None:
    """Run the cases; see the module."""
    given = _arguments()
    if given.measure is not None:
        print(json.dumps(measure(given.measure, given.tokenizer)))
        return
    work = Path(tempfile.mkdtemp(prefix="bench-", dir=given.work))
    try:
        sys.exit(run(given, work))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(given: argparse.Namespace, work: Path) -> int:
    """Measure each case in a process of its own; give the exit code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    print(f"{'case':<24}{'input MB':>10}{'worker peak MB':>16}{'driver peak MB':>16}{'s':>8}")
    measured = {}
    for case in cases(read_corpus(given.corpus), given.gigabytes):
        source = work / case.name
        case.write(source)
        num_bytes = sum(path.stat().st_size for path in source.iterdir())
        command = [sys.executable, "-m", "tests.bench.worker_memory", "--measure", str(source)]
        done = subprocess.run(
            [*command, "--tokenizer", str(given.tokenizer.absolute())],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        shutil.rmtree(source)
        if done.returncode != 0:
            raise SystemExit(f"{case.name}: exit code {done.returncode}")
        figures = measured[case.name] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{case.name:<24}{num_bytes / 1e6:>10.1f}{figures['worker_bytes'] / 1e6:>16.0f}"
            f"{figures['driver_bytes'] / 1e6:>16.0f}{figures['seconds']:>8.1f}",
            flush=True,
        )
    if given.result is not None:
        given.result.write_text(json.dumps(measured, indent=2) + "\n")
    above = [name for name, figures in measured.items() if figures["worker_bytes"] >= LIMIT_BYTES]
    print(f"workers of {LIMIT_BYTES / 1e9} GB or more: {', '.join(above) or 'none'}")
    return 1 if above else 0


def cases(documents: Sequence[CorpusDocument], gigabytes: float) -> Iterator[Case]:
    """Give the cases, the cheapest first."""
    tiny = cut_tiny(documents)

    def with_long(make: Callable[[], str], directory: Path) -> None:
        directory.mkdir()
        lines = [document.line(document.id) for document in tiny]
        long = json.dumps({"id": "long", "text": make()}, ensure_ascii=False).encode()
        (directory / "long.jsonl").write_bytes(b"".join([*lines, long, b"\n"]))

    yield Case(
        name="short-documents",
        write=lambda directory: write_repeated(tiny, directory, 1e4, ".jsonl"),
    )
    for suffix in (".jsonl", ".jsonl.zst"):
        write = partial(write_repeated, documents, num_bytes=gigabytes * 1e9, suffix=suffix)
        yield Case(name=f"splits{suffix}", write=write)
    english = [document.text for document in documents]
    yield Case(name="long-english", write=lambda d: with_long(lambda: join_text(english), d))
    yield Case(name="long-chinese", write=lambda d: with_long(chinese_text, d))


def join_text(texts: Sequence[str]) -> str:
    """Give texts one after the other, again and again, to the size of the long document."""
    parts, size = [], 0
    for text in cycle(texts):
        parts.append(text)
        size += len(text.encode())
        if size >= LONG_DOCUMENT_BYTES:
            return "".join(parts).encode()[:LONG_DOCUMENT_BYTES].decode(errors="ignore")
    raise AssertionError("cycle ends only where there is no text")


def chinese_text() -> str:
    """Give random CJK ideographs in lines of 60."""
    drawn = np.random.default_rng(0).integers(0x4E00, 0x9FA5, LONG_DOCUMENT_BYTES // 3, "<u2")
    drawn[59::60] = ord("\n")
    return drawn.tobytes().decode("utf-16-le")


def measure(source: Path, tokenizer: Path) -> dict[str, float]:
    """Prepare a directory; give the largest peak of a worker, that of this process, and seconds."""
    from pipeline.config.data import DataConfig, SourceConfig, TokenizerConfig
    from pipeline.data.prepare import prepare
    from pipeline.data.ray_tasks import ray_session

    output = Path(f"{source}-prepared")
    config = DataConfig(
        source=SourceConfig(kind="jsonl", path=str(source)),
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        validation_fraction=0.5,
        max_document_bytes=RAISED_BYTES,
        output_dir=output,
    )
    peaks: dict[int, int] = {}
    stopped = threading.Event()
    with ray_session(num_cpus=2):
        watcher = threading.Thread(target=_watch, args=(peaks, stopped))
        watcher.start()
        started = time.perf_counter()
        try:
            prepare(config)
        finally:
            seconds = time.perf_counter() - started
            stopped.set()
            watcher.join()
            shutil.rmtree(output, ignore_errors=True)
    return {
        "worker_bytes": max(peaks.values()),
        "driver_bytes": peak_bytes(os.getpid()),
        "seconds": seconds,
    }


def peak_bytes(pid: int) -> int:
    """Give the VmHWM of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def _watch(peaks: dict[int, int], stopped: threading.Event) -> None:
    """Keep the last peak of every worker of this process's Ray; a peak only grows."""
    own = psutil.Process()
    is_last = False
    while not is_last:
        is_last = stopped.wait(SAMPLE_SECONDS)
        for process in own.children(recursive=True):
            try:
                if process.name().startswith("ray::") or "ray::" in " ".join(process.cmdline()):
                    peaks[process.pid] = peak_bytes(process.pid)
            except (psutil.NoSuchProcess, OSError):
                continue


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="directory of .jsonl[.zst]")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of GPT-2")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--work", type=Path, help="where inputs and outputs stand meanwhile")
    parser.add_argument("--result", type=Path, help="JSON to write")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.corpus is None and given.measure is None:
        parser.error("--corpus is missing")
    return given


if __name__ == "__main__":
    main()
