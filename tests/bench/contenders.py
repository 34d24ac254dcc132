"""Runs each contender on what it reads, in fresh processes, and keeps what each run took."""

import json
import os
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.corpora import Corpus
from tests.bench.megatron import Megatron
from tests.bench.timing import Run, run_command

ROOT = Path(__file__).resolve().parents[2]
MEGATRON = ("megatron", "megatron_fast")
VARIANTS = {"plain": ".jsonl", "zst": ".jsonl.zst"}
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONWARNINGS": "ignore",
}
"""One thread a process, since there are two processes on two cores; no network."""


@dataclass(kw_only=True)
class Bench:
    """What one benchmark has: inputs on disk, interpreters, runs so far."""

    work: Path
    tokenizer: Path
    python: str
    once: Corpus
    tiny: Corpus
    repeated: dict[str, Corpus]
    megatron: Megatron | None = None
    runs: dict[str, list[Run]] = field(default_factory=lambda: defaultdict(list))
    own_reports: list[dict[str, Any]] = field(default_factory=list)

    def program(self, name: str, source: Path, output: Path, python: str) -> Run:
        """Run a contender of `programs`."""
        command = [python, "-m", "tests.bench.programs", name]
        places = ("--tokenizer", self.tokenizer, "--input", source, "--output", output)
        environment = os.environ | SETTINGS | {"PYTHONPATH": str(ROOT), "HOME": str(self.work)}
        return run_command([*command, *map(str, places)], ROOT, environment)

    def peer(self, name: str, output: Path, *, is_start: bool) -> Run:
        """Run a peer on its corpus, or on the tiny one to see what its start takes."""
        once = self.tiny if is_start else self.once
        if name not in MEGATRON:
            return self.program(name, once.directory / "dealt", output, self.python)
        output.mkdir()
        lines = once.directory / "all" / "all.jsonl"
        if name == "megatron_fast" and not is_start:
            lines = self.joined
        return self.run_megatron(lines, output / "out", is_fast=name == "megatron_fast")

    def run_megatron(self, lines: Path, prefix: Path, *, is_fast: bool = False) -> Run:
        """Run Megatron's script on one file."""
        assert self.megatron is not None
        given = {"HOME": str(self.work)} | self.megatron.environment
        # The fast script is one process, so its threads have both cores.
        given |= {"RAYON_NUM_THREADS": "2"} if is_fast else {}
        command = self.megatron.command(lines, prefix, is_fast=is_fast)
        return run_command(command, self.work, os.environ | SETTINGS | given)

    def corpus_of(self, name: str) -> Corpus:
        """Give the corpus that a peer reads."""
        return self.repeated["plain"] if name == "megatron_fast" else self.once

    @property
    def joined(self) -> Path:
        """The plain repeated corpus in one file."""
        return self.work / "joined.jsonl"


def run_once(bench: Bench, present: list[str]) -> None:
    """Run every contender once, one after the other, each first on the tiny corpus."""
    for name in present:
        for label in (f"{name}/start", name):
            output = _fresh(bench.work / "out" / label.replace("/", "-"))
            bench.runs[label].append(bench.peer(name, output, is_start=label != name))
            _tell(label, bench.runs[label][-1])
    for variant in ("tiny", *VARIANTS):
        label = "bare/start" if variant == "tiny" else f"bare/{variant}"
        output = _fresh(bench.work / "out" / label.replace("/", "-"))
        source = bench.work / "ours" / variant
        bench.runs[label].append(bench.program("bare", source, output, sys.executable))
        _tell(label, bench.runs[label][-1])
    output = _fresh(bench.work / "out" / "tandem")
    done = bench.program("tandem", bench.work / "ours", output, sys.executable)
    bench.own_reports.append(json.loads(done.output.splitlines()[-1]))
    _tell("tandem (all)", done)
    print(f"  {done.output.strip()}", flush=True)


def _fresh(output: Path) -> Path:
    for path in (output, Path(f"{output}.cache"), Path(f"{output}.logs")):
        shutil.rmtree(path, ignore_errors=True)
    output.parent.mkdir(exist_ok=True)
    return output


def _tell(label: str, done: Run) -> None:
    load = os.getloadavg()[0]
    print(
        f"  {label}: {done.seconds:.2f} s, cpu {done.cpu_seconds:.2f} s, load {load:.1f}",
        flush=True,
    )
