"""What each contender runs, in a process of its own: JSON lines in, token files out.

    python -m tests.bench.programs NAME --tokenizer FILE --input DIR --output DIR

Libraries load inside the function that needs them, so that one may be absent and none slows the
start of another. Every encoder gets one thread in each of two processes.
"""

import argparse
import io
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.bench.reference_encoder import encode_by_reference

NUM_PROCESSES = 2
END_OF_DOCUMENT = "<|endoftext|>"
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 23
VALIDATION_FRACTION = 0.05


def run_datasets(tokenizer: Path, source: Path, output: Path) -> None:
    """Hugging Face `datasets`: load JSON, map in batches of 1000, save; ids as uint16."""
    import datasets

    datasets.disable_progress_bars()
    files = sorted(str(path) for path in source.glob("*.jsonl"))
    loaded = datasets.load_dataset(
        "json", data_files=files, split="train", num_proc=NUM_PROCESSES, cache_dir=f"{output}.cache"
    )
    features = datasets.Features(
        {"id": datasets.Value("string"), "ids": datasets.Sequence(datasets.Value("uint16"))}
    )

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        return {"id": batch["id"], "ids": encode_by_reference(str(tokenizer), batch["text"])}

    mapped = loaded.map(
        encode,
        batched=True,
        batch_size=1000,
        num_proc=NUM_PROCESSES,
        remove_columns=loaded.column_names,
        features=features,
    )
    mapped.save_to_disk(str(output), num_proc=NUM_PROCESSES)


def run_datatrove(tokenizer: Path, source: Path, output: Path) -> None:
    """`datatrove`: two tasks, two workers, no second pass that shuffles."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(source), glob_pattern="*.jsonl"),
            DocumentTokenizer(
                str(output),
                tokenizer_name_or_path=str(tokenizer),
                eos_token=END_OF_DOCUMENT,
                batch_size=1000,
                shuffle_documents=False,
            ),
        ],
        tasks=NUM_PROCESSES,
        workers=NUM_PROCESSES,
        logging_dir=f"{output}.logs",
    ).run()


def run_ray_rows(tokenizer: Path, source: Path, output: Path) -> None:
    """Ray Data by rows: read_json, map_batches of 512 with `tokenizers`, write_parquet."""
    import numpy as np
    import pyarrow as pa
    import ray.data

    from pipeline.data.ray_surroundings import short_directory

    def encode(batch: pa.Table) -> pa.Table:
        ids = encode_by_reference(str(tokenizer), batch["text"].to_pylist())
        offsets = np.cumsum([0] + [len(one) for one in ids], dtype=np.int32)
        flat = pa.array(np.concatenate([np.array(one, dtype=np.uint16) for one in ids]))
        column = pa.ListArray.from_arrays(pa.array(offsets), flat)
        return pa.table({"id": batch["id"], "ids": column})

    with short_directory() as directory:
        ray.init(
            "local",
            num_cpus=NUM_PROCESSES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
            _temp_dir=directory,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.read_json(sorted(str(path) for path in source.glob("*.jsonl")))
        encoded = rows.map_batches(encode, batch_size=512, batch_format="pyarrow")
        encoded.write_parquet(str(output))
        ray.shutdown()


def run_bare(tokenizer: Path, source: Path, output: Path) -> None:
    """The decoder, parser and encoder that we use in two processes, and nothing around them."""
    output.mkdir()
    paths = sorted(source.glob("*.jsonl*"))
    jobs = [(tokenizer, path, output / f"{path.name}.bin") for path in paths]
    with multiprocessing.get_context("spawn").Pool(NUM_PROCESSES) as pool:
        pool.starmap(_encode_bare, jobs, chunksize=1)


def run_tandem(tokenizer: Path, source: Path, output: Path) -> None:
    """`prepare` with Ray up; prints what each corpus took.

    The tiny corpus and the one without repeats come first and start Ray's workers; the tiny one
    comes a second time, as `start`, and is what a `prepare` takes before and after its work.
    """
    from pipeline.config.data import DataConfig, SourceConfig, TokenizerConfig
    from pipeline.data.prepare import prepare
    from pipeline.data.progress import PrepareEvent
    from pipeline.data.ray_tasks import ray_session

    task_seconds = 0.0

    def on_event(event: PrepareEvent) -> None:
        nonlocal task_seconds
        task_seconds = event.totals.seconds if event.totals else task_seconds

    started = time.perf_counter()
    with ray_session(num_cpus=NUM_PROCESSES):
        report: dict[str, Any] = {"ray_start_seconds": time.perf_counter() - started}
        repeated = {path.name for path in source.iterdir()} - {"tiny", "once"}
        corpora = {"tiny": "tiny", "once": "once", "start": "tiny"}
        for name, corpus in (corpora | {name: name for name in sorted(repeated)}).items():
            config = DataConfig(
                source=SourceConfig(kind="jsonl", path=str(source / corpus)),
                tokenizer=TokenizerConfig(path=str(tokenizer)),
                validation_fraction=0.5 if corpus == "tiny" else VALIDATION_FRACTION,
                output_dir=output / name,
            )
            started = time.perf_counter()
            manifest = prepare(config, on_event)
            report[name] = {
                "seconds": time.perf_counter() - started,
                "task_seconds": task_seconds,
                "text_bytes": sum(split.text_bytes for split in manifest.splits.values()),
                "encoder": f"{manifest.encoder} {manifest.encoder_version}",
                "directory": str(manifest.directory),
            }
    print(json.dumps(report))


PROGRAMS: dict[str, Callable[[Path, Path, Path], None]] = {
    "datasets": run_datasets,
    "datatrove": run_datatrove,
    "ray_rows": run_ray_rows,
    "bare": run_bare,
    "tandem": run_tandem,
}


@lru_cache(maxsize=1)
def _fast(tokenizer: str) -> Any:
    import fastokens

    return fastokens.Tokenizer.from_file(tokenizer)


def _encode_bare(tokenizer: Path, path: Path, target: Path) -> None:
    import numpy as np

    encoder = _fast(str(tokenizer))
    with target.open("wb") as stream:
        for texts in _batches(path):
            ids, _ = encoder.encode_batch_flat(
                texts, add_special_tokens=False, split_special_tokens=True
            )
            stream.write(np.frombuffer(ids, "<u4").astype("<u2").data)


def _batches(path: Path) -> Iterator[list[str]]:
    import orjson
    import zstandard

    texts: list[str] = []
    characters = 0
    with path.open("rb") as file:
        lines: Any = file
        if path.suffix == ".zst":
            lines = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file), 1 << 20)
        for line in lines:
            text = orjson.loads(line)["text"]
            texts.append(text)
            characters += len(text)
            if len(texts) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield texts
                texts, characters = [], 0
    if texts:
        yield texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PROGRAMS)
    for option in ("--tokenizer", "--input", "--output"):
        parser.add_argument(option, type=Path, required=True)
    given = parser.parse_args()
    PROGRAMS[given.name](given.tokenizer, given.input, given.output)


if __name__ == "__main__":
    main()
