"""Tokenization beside its peers, end to end, in one run.

    pip install -e ".[bench]"
    python -m tests.bench.tokenize_peers --corpus DIR --tokenizer tokenizer.json \\
        [--megatron CHECKOUT] [--gigabytes 1] [--repeats 3] [--result FILE.json]

Contenders: our `prepare`; the same decoder, parser and encoder bare in two processes; Hugging Face
`datasets`, `datatrove`, Megatron's `preprocess_data.py` and Ray Data by rows (settings: `programs`
and `megatron`). Ours and the bare one read the corpus repeated to `--gigabytes`, as plain files and
as zstd; the peers read it once, as plain files. Megatron's new `preprocess_data_fast.py`, built on
gigatoken, is shown beside them on the repeated corpus in one plain file; no target names it.
Everything runs in fresh processes, interleaved over the repeats, on two cores, from page cache.

What is counted. Of every contender the whole of its work less the same on eight short documents, so
without its start. Peers and bare: the whole command. Ours: `prepare` with Ray and its workers up;
what Ray, the first `prepare` and a later one take to start stands beside it, and so does the rate
with the start of `prepare` left in.

Then the ids of every document of every contender are compared with those of `tokenizers`, and our
shards byte by byte with those that Megatron writes from the same documents. The exit code is 1
where a target is missed, an id differs, or a peer that was asked for is absent.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.data.shards import load_manifest
from tests.bench import reference
from tests.bench.contenders import MEGATRON, VARIANTS, Bench, run_once
from tests.bench.corpora import (
    NUM_PEER_FILES,
    CorpusDocument,
    cut_tiny,
    is_held_out,
    read_corpus,
    write_dealt,
    write_joined,
    write_repeated,
)
from tests.bench.megatron import copy_megatron
from tests.bench.peer_report import BESIDE, PEERS, Result, judge, print_table
from tests.bench.programs import END_OF_DOCUMENT, VALIDATION_FRACTION
from tests.bench.timing import Spread, cpu_model, own_versions, versions_in

NEEDS = {
    "datasets": ("datasets", "tokenizers"),
    "datatrove": ("datatrove", "orjson", "tokenizers"),
    "megatron": ("torch", "transformers", "triton"),
    "megatron_fast": ("awkward", "gigatoken", "torch", "transformers", "triton"),
    "ray_rows": ("ray", "pyarrow", "tokenizers"),
}
"""Packages that each peer needs beside its own code."""
OURS = ("fastokens", "numpy", "orjson", "ray", "tokenizers", "zstandard")


def main() -> None:
    """Run the benchmark; see the module."""
    given = _arguments()
    parent = tempfile.mkdtemp(prefix="bench-", dir=given.work)
    try:
        sys.exit(run(given, Path(parent)))
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def run(given: argparse.Namespace, work: Path) -> int:
    """Run everything in `work`; give the exit code."""
    environment = describe_environment(given)
    print(json.dumps(environment, indent=2), flush=True)
    documents = read_corpus(given.corpus)
    bench = write_inputs(given, work, documents)
    absent = find_absent(given, bench)
    present = [name for name in given.peers if name not in absent]
    for repeat in range(given.repeats):
        print(f"repeat {repeat + 1} of {given.repeats}", flush=True)
        run_once(bench, present)
    print("comparing ids with tokenizers", flush=True)
    differing = count_differing(bench, documents, present)
    results = gather(bench, present, differing)
    unequal = unequal_shards(bench, documents) if bench.megatron is not None else None
    print_table(results, absent, unequal)
    verdicts = judge(results, absent, unequal)
    for verdict in verdicts:
        print(verdict.line)
    if given.result is not None:
        record = {
            "environment": environment,
            "results": {name: result.as_json() for name, result in results.items()},
            "absent": absent,
            "shards_unlike_megatron": unequal,
            "verdicts": {verdict.claim: verdict.is_met for verdict in verdicts},
        }
        given.result.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(verdict.is_met for verdict in verdicts) else 1


def describe_environment(given: argparse.Namespace) -> dict[str, Any]:
    """Give what the figures depend on."""
    packages = sorted({name for names in NEEDS.values() for name in names})
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "ours": own_versions(OURS),
        "peers": versions_in(given.peer_python, packages),
        "arguments": {name: str(value) for name, value in vars(given).items()},
    }


def write_inputs(given: argparse.Namespace, work: Path, documents: list[CorpusDocument]) -> Bench:
    """Write every corpus that a contender reads."""
    ours = work / "ours"
    tiny = cut_tiny(documents)
    once = write_dealt(documents, work / "once")
    few = write_dealt(tiny, work / "few")
    (ours / "tiny").parent.mkdir()
    shutil.copytree(few.directory / "dealt", ours / "tiny")
    shutil.copytree(once.directory / "dealt", ours / "once")
    repeated = {
        name: write_repeated(documents, ours / name, given.gigabytes * 1e9, suffix)
        for name, suffix in VARIANTS.items()
    }
    bench = Bench(
        work=work,
        tokenizer=given.tokenizer.absolute(),
        python=given.peer_python,
        once=once,
        tiny=few,
        repeated=repeated,
    )
    if given.megatron is not None:
        bench.megatron = copy_megatron(
            given.megatron, work / "megatron", given.tokenizer, END_OF_DOCUMENT, given.peer_python
        )
    if "megatron_fast" in given.peers:
        write_joined(repeated["plain"], bench.joined)
    return bench


def find_absent(given: argparse.Namespace, bench: Bench) -> dict[str, str]:
    """Say of each peer that cannot run what is missing."""
    absent = {}
    for name in given.peers:
        missing = set(NEEDS[name]) - set(versions_in(bench.python, NEEDS[name]))
        if missing:
            absent[name] = f"pip install {' '.join(sorted(missing))} (the bench extra)"
        elif name in MEGATRON and bench.megatron is None:
            absent[name] = "give --megatron CHECKOUT of github.com/NVIDIA/Megatron-LM"
    return absent


def count_differing(
    bench: Bench, documents: list[CorpusDocument], present: list[str]
) -> dict[str, int]:
    """Give for each contender how many documents of its last run differ from the reference."""
    expected = reference.reference_ids(bench.tokenizer, documents)
    output = bench.work / "out"
    report = bench.own_reports[-1]
    differing = {
        f"tandem/{name}": reference.differing_in_shards(
            Path(report[name]["directory"]), corpus, expected, VALIDATION_FRACTION
        )
        for name, corpus in bench.repeated.items()
    }
    dealt = [[d.id for d in documents[i::NUM_PEER_FILES]] for i in range(NUM_PEER_FILES)]
    checks = {
        "datasets": lambda path: reference.differing_in_datasets(path, expected),
        "datatrove": lambda path: reference.differing_in_datatrove(path, dealt, expected),
        "ray_rows": lambda path: reference.differing_in_parquet(path, expected),
    }
    for name in set(MEGATRON) & set(present):
        differing[name] = reference.differing_in_megatron(
            bench.corpus_of(name), expected, output / name / "out_text_document"
        )
    return differing | {name: checks[name](output / name) for name in set(checks) & set(present)}


def gather(bench: Bench, present: list[str], differing: dict[str, int]) -> dict[str, Result]:
    """Turn runs into results, the start of each contender subtracted where it has to be."""
    results = {}
    timed = {name: (name, bench.corpus_of(name)) for name in present}
    timed |= {f"bare/{name}": ("bare", corpus) for name, corpus in bench.repeated.items()}
    for label, (name, corpus) in timed.items():
        start = Spread.of([run.seconds for run in bench.runs[f"{name}/start"]])
        net = [run.seconds - start.median for run in bench.runs[label]]
        if min(net) <= 0.0:
            raise SystemExit(f"{label} takes no longer than its start; give a larger --corpus")
        results[label] = Result(
            text_bytes=corpus.text_bytes,
            seconds=Spread.of(net),
            start_seconds=start,
            cpu_seconds=Spread.of([run.cpu_seconds for run in bench.runs[label]]),
            differing_documents=differing.get(label),
        )
    reports = bench.own_reports
    for name, corpus in bench.repeated.items():
        assert all(report[name]["text_bytes"] == corpus.text_bytes for report in reports)
        results[f"tandem/{name}"] = Result(
            text_bytes=corpus.text_bytes,
            seconds=Spread.of([r[name]["seconds"] - r["start"]["seconds"] for r in reports]),
            start_seconds=Spread.of([r["start"]["seconds"] for r in reports]),
            whole_seconds=Spread.of([r[name]["seconds"] for r in reports]),
            task_seconds=Spread.of([r[name]["task_seconds"] for r in reports]),
            ray_seconds=Spread.of([r["ray_start_seconds"] for r in reports]),
            first_seconds=Spread.of([r["tiny"]["seconds"] for r in reports]),
            differing_documents=differing[f"tandem/{name}"],
        )
    return results


def unequal_shards(bench: Bench, documents: list[CorpusDocument]) -> list[str]:
    """Let Megatron write every shard from its documents; name the files that differ."""
    texts = {document.id: document for document in documents}
    directory = Path(bench.own_reports[-1]["once"]["directory"])
    manifest = load_manifest(directory)
    unequal = []
    for split in ("train", "validation"):
        ids = iter(
            document_id
            for document_id, _ in bench.once.document_ids
            if is_held_out(document_id, VALIDATION_FRACTION) == (split == "validation")
        )
        for shard in manifest.splits[split].shards:
            own = [next(ids) for _ in range(shard.documents)]
            lines = bench.work / f"{shard.name}.jsonl"
            lines.write_bytes(b"".join(texts[one].line(one) for one in own))
            bench.run_megatron(lines, bench.work / shard.name)
            for suffix in (".bin", ".idx"):
                theirs = bench.work / f"{shard.name}_text_document{suffix}"
                if theirs.read_bytes() != (directory / f"{shard.name}{suffix}").read_bytes():
                    unequal.append(f"{shard.name}{suffix}")
    return unequal


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="directory of .jsonl[.zst]")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of GPT-2")
    parser.add_argument("--megatron", type=Path, help="checkout of Megatron-LM")
    parser.add_argument("--peers", nargs="*", choices=PEERS + BESIDE, default=PEERS + BESIDE)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="text of ours and bare")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where inputs and outputs stand meanwhile")
    parser.add_argument("--result", type=Path, help="JSON to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
