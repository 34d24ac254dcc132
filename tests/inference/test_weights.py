import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import CheckpointError, DataError
from pipeline.inference import tensor_files
from pipeline.inference.tensor_files import read_header
from pipeline.inference.weights import load_trained
from pipeline.training.checkpoint_files import list_checkpoints, read_manifest
from tests.inference.cases import FAMILIES, header_bytes, make_run, rewrite_manifest
from tests.inference.conftest import Made

ONE = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def test_a_run_gives_the_weights_of_its_newest_checkpoint(made: Made) -> None:
    trained = made.load()
    assert trained.step == 2
    assert not trained.model.training
    found = dict(trained.model.named_parameters())
    for name, parameter in made.model.named_parameters():
        assert torch.equal(found[name], parameter)


def test_an_older_checkpoint_is_found_by_step_and_by_path(made: Made) -> None:
    by_step = load_trained(made.run_dir, step=1)
    by_path = load_trained(list_checkpoints(made.run_dir)[1])
    assert by_step.checkpoint == by_path.checkpoint
    assert torch.equal(by_step.model.embedding_VD, by_path.model.embedding_VD)
    assert not torch.equal(by_step.model.embedding_VD, made.model.embedding_VD)


def test_a_damaged_checkpoint_is_passed_over_and_named(own_run: Made) -> None:
    newest = list_checkpoints(own_run.run_dir)[0]
    file = newest / read_manifest(newest).files[0].name
    file.write_bytes(file.read_bytes()[:-1])
    said: list[str] = []
    assert load_trained(own_run.run_dir, on_event=said.append).step == 1
    assert "step-00000002" in said[0]
    with pytest.raises(CheckpointError, match=r"intact.*step-00000002.*bytes instead of"):
        load_trained(own_run.run_dir, step=2, on_event=said.append)
    with pytest.raises(CheckpointError, match="damaged"):
        load_trained(newest)


def test_what_is_no_model_directory_is_refused(own_run: Made, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no directory"):
        load_trained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither run\.yaml nor manifest\.json"):
        load_trained(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has 1, 2"):
        load_trained(own_run.run_dir, step=7)
    lonely = tmp_path / "elsewhere" / "deep"
    shutil.copytree(list_checkpoints(own_run.run_dir)[0], lonely / "step-00000002")
    with pytest.raises(CheckpointError, match="outside a run directory"):
        load_trained(lonely / "step-00000002")
    shutil.rmtree(own_run.run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_trained(own_run.run_dir)


def test_a_checkpoint_of_another_family_or_data_is_refused(own_run: Made) -> None:
    checkpoint = list_checkpoints(own_run.run_dir)[0]
    rewrite_manifest(checkpoint, family="lstm_attention")
    with pytest.raises(CheckpointError, match=r"lstm_attention.*model\.family=gpt"):
        load_trained(checkpoint)
    rewrite_manifest(checkpoint, family="gpt", data_fingerprint="b" * 16)
    with pytest.raises(CheckpointError, match=r"data\.prepared_dir"):
        load_trained(checkpoint)


@pytest.mark.parametrize(("field", "other"), [("heads: 4", "heads: 2"), ("10000.0", "500.0")])
def test_a_checkpoint_of_another_config_of_equal_shapes_is_refused(
    own_run: Made, field: str, other: str
) -> None:
    file = own_run.run_dir / "run.yaml"
    text = file.read_text()
    assert field in text
    file.write_text(text.replace(field, other))
    with pytest.raises(CheckpointError, match=r"another config than the run\.yaml"):
        own_run.load()


def test_a_checkpoint_of_another_shape_or_vocabulary_is_refused(
    own_run: Made, tmp_path: Path
) -> None:
    other, _ = make_run(tmp_path / "wider", FAMILIES["gpt"] | {"feed_forward_width": 40})
    checkpoint = list_checkpoints(own_run.run_dir)[0]
    own_hash = read_manifest(checkpoint).config_hash
    shutil.rmtree(checkpoint)
    shutil.copytree(list_checkpoints(other)[0], checkpoint)
    rewrite_manifest(checkpoint, config_hash=own_hash)
    with pytest.raises(CheckpointError, match=r"feed_forward\.\w+\.weight has shape .80, 32"):
        load_trained(checkpoint)
    other, _ = make_run(tmp_path / "padded", FAMILIES["gpt"] | {"vocab_size": 999})
    shutil.rmtree(checkpoint)
    shutil.copytree(list_checkpoints(other)[0], checkpoint)
    rewrite_manifest(checkpoint, config_hash=own_hash)
    with pytest.raises(CheckpointError, match=r"vocabulary of 999 .*model\.vocab_size"):
        load_trained(checkpoint)


def test_a_missing_tensor_is_named(own_run: Made) -> None:
    checkpoint = list_checkpoints(own_run.run_dir)[0]
    files = read_manifest(checkpoint).files
    rewrite_manifest(checkpoint, files=files[:1])
    with pytest.raises(CheckpointError, match=r"is missing.*\d+ missing, 0 unknown"):
        load_trained(checkpoint)


def test_another_tokenizer_beside_the_shards_is_refused(own_run: Made) -> None:
    tokenizer = own_run.load().shards.directory / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=2))
    with pytest.raises(DataError, match="not the tokenizer of these shards"):
        own_run.load()


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(header_bytes({"__metadata__": {"format": "pt"}, **ONE}, 24))
    assert read_header(path)["w"].shape == (2, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((1 << 40).to_bytes(8, "little") + bytes(64), "header has 1099511627776 bytes"),
        (b"\xff" * 64, "header has 18446744073709551615 bytes"),
        (b"abc", "header has"),
        (b"", "header has 0 bytes"),
        ((8).to_bytes(8, "little") + b"garbled!", "not JSON"),
        ((40).to_bytes(8, "little") + b"[" * 40, "not JSON"),
        (header_bytes(["w"], 0), "is list, not an object"),
        (header_bytes({"w": {"dtype": "F32"}}, 0), "other fields"),
        (header_bytes({"w": ONE["w"] | {"dtype": "F31"}}, 24), "dtype 'F31'; legal: F64"),
        (header_bytes({"w": ONE["w"] | {"shape": [-2, 3]}}, 24), "shape"),
        (header_bytes({"w": ONE["w"] | {"shape": [2**40, 2**40]}}, 24), "needs"),
        (header_bytes({"w": ONE["w"] | {"data_offsets": [8, 32]}}, 24), "within"),
        (header_bytes(ONE, 20), "within 0 to 20"),
        (header_bytes(ONE, 30), "has 30 bytes of data"),
    ],
)  # fmt: skip
def test_a_bloated_or_garbled_file_is_refused_by_name(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors") as refusal:
        read_header(path)
    assert message in str(refusal.value)


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    """A sparse file: had the header been read, it would be found to be no JSON."""
    path = tmp_path / "bloated.safetensors"
    with path.open("wb") as file:
        file.write((tensor_files.MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(tensor_files.MAX_HEADER_BYTES * 2)
    with pytest.raises(CheckpointError, match=f"legal are 2 to {tensor_files.MAX_HEADER_BYTES}"):
        read_header(path)


def test_weights_that_are_not_finite_are_refused(own_run: Made) -> None:
    tensors: dict[str, Any] = dict(own_run.model.named_parameters())
    tensors["final_norm.weight"] = torch.full((32,), torch.nan)
    with pytest.raises(CheckpointError, match=r"final_norm\.weight is not finite"):
        tensor_files.fill_parameters(own_run.model, tensors)
