"""One split to its shards in this process: the encoder that takes over, long documents, memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from pipeline.config.data import DataConfig, TokenizerConfig
from pipeline.data.encoders import build_reference
from pipeline.data.indexed import read_index, token_dtype
from pipeline.data.ledger import SplitResult
from pipeline.data.make_shards import ShardJob, make_shards
from pipeline.data.sources import build_sources, plan_splits
from pipeline.data.tokenizer import TokenizerFacts, load_tokenizer, train_tokenizer

Make = Callable[..., DataConfig]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def trained() -> TokenizerFacts:
    words = "the ship and the sea said Holmes in the garden " * 20
    return train_tokenizer([words], TokenizerConfig(vocab_size=300))


def make(data: DataConfig, facts: TokenizerFacts, directory: Path) -> SplitResult:
    directory.mkdir()
    (split,) = plan_splits(build_sources(data))
    job = ShardJob(
        data=data,
        directory=directory,
        tokenizer_json=facts.tokenizer_json,
        encoder="fastokens",
        end_of_document_id=facts.end_of_document_id,
        dtype=token_dtype(facts.vocab_size),
    )
    return make_shards(split, job)


def documents_of(result: SplitResult, directory: Path) -> list[list[int]]:
    found = []
    for shard in result.shards.values():
        tokens = np.fromfile(directory / f"{shard.name}.bin", dtype="<u2").tolist()
        for length in read_index(directory / f"{shard.name}.idx").lengths_tokens.tolist():
            found.append(tokens[:length])
            tokens = tokens[length:]
    return found


def test_where_the_fast_encoder_differs_in_a_file_the_reference_makes_the_split(
    trained: TokenizerFacts, tmp_path: Path, make_config: Make, write_jsonl: Callable[..., Path]
) -> None:
    tokenizer = Tokenizer.from_str(trained.tokenizer_json)
    tokenizer.add_tokens([AddedToken("foob", normalized=True), AddedToken("bar", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    facts = load_tokenizer(tmp_path / "tokenizer.json", END)
    texts = ["the ship", "the foobar of the sea"]
    write_jsonl(tmp_path / "text" / "a.jsonl", [{"text": texts[0]}])
    write_jsonl(tmp_path / "text" / "b.jsonl", [{"text": texts[1]}])
    config = make_config(tmp_path / "text", tmp_path / "out", validation_fraction=1e-9)
    result = make(config, facts, tmp_path / "shards")
    (note,) = result.notes
    assert "takes over: fastokens" in note
    assert "in b.jsonl" in note
    assert result.shards["train"].encoder == "tokenizers"
    expected = build_reference(facts.tokenizer_json, False)
    assert documents_of(result, tmp_path / "shards") == [
        [*expected.encode([text])[0].tolist(), facts.end_of_document_id] for text in texts
    ]


@pytest.mark.parametrize("is_special", [False, True])
def test_special_tokens_in_text_are_text_unless_the_config_says_so(
    trained: TokenizerFacts, tmp_path: Path, make_config: Make, write_jsonl: Callable[..., Path],
    is_special: bool,
) -> None:  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(trained.tokenizer_json)
    facts = load_tokenizer(tmp_path / "tokenizer.json", END, is_special)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"the{END}ship"}])
    fields: dict[str, Any] = {"tokenizer": {"special_tokens_in_text": is_special}}
    config = make_config(path, tmp_path / "out", validation_fraction=1e-9, **fields)
    result = make(config, facts, tmp_path / "shards")
    (document,) = documents_of(result, tmp_path / "shards")
    assert document.count(facts.end_of_document_id) == 1 + is_special
    assert result.shards["train"].encoder == "fastokens"


def test_a_long_document_is_one_document_with_the_ids_of_the_whole(
    trained: TokenizerFacts, tmp_path: Path, make_config: Make
) -> None:
    text = "the ship, the sea; Holmes said:\n'in the garden' " * 30_000
    (tmp_path / "a.txt").write_text(text)
    config = make_config(
        tmp_path / "a.txt", tmp_path / "out", source={"kind": "text"}, validation_fraction=1e-9
    )
    result = make(config, trained, tmp_path / "shards")
    (document,) = documents_of(result, tmp_path / "shards")
    whole, _ = build_reference(trained.tokenizer_json, False).encode([text])
    assert document == [*whole.tolist(), trained.end_of_document_id]
    assert result.shards["train"].text_bytes == len(text)
