import numpy as np
import pytest
import torch

from pipeline.training.memory import OutOfMemory, explaining_memory
from tests.training.cases import small_run


def test_torch_that_gets_no_memory_becomes_one_line_with_what_to_change() -> None:
    run = small_run("gpt", 1)
    with (
        pytest.raises(OutOfMemory) as failed,
        explaining_memory(3, run, lambda: 5 * 2.0**30),
    ):
        torch.empty(1 << 50)
    told = str(failed.value)
    assert told.startswith("rank 3 ran out of host memory with a peak of 5.00 GiB (")
    assert "train.micro_batch_samples (now 2)" in told
    assert "zero.stage (now 1)" in told
    assert "train.activation_checkpointing=true" in told
    assert "\n" not in told
    assert failed.value.kind == "LaunchError"


def test_numpy_that_gets_no_memory_as_well() -> None:
    with (
        pytest.raises(OutOfMemory, match="rank 0 ran out of host memory \\(Unable to allocate"),
        explaining_memory(0, small_run("gpt"), lambda: None),
    ):
        np.empty(1 << 58)


def test_device_without_memory_is_called_so() -> None:
    with (
        pytest.raises(OutOfMemory, match="ran out of GPU memory.*CUDA out of memory"),
        explaining_memory(0, small_run("gpt"), lambda: None),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")


def test_other_errors_pass_as_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match="^Connection closed by peer$"),
        explaining_memory(0, small_run("gpt"), lambda: None),
    ):
        raise RuntimeError("Connection closed by peer")


def test_what_cannot_be_lowered_any_more_is_not_suggested() -> None:
    train = {"micro_batch_samples": 1, "activation_checkpointing": True}
    with (
        pytest.raises(OutOfMemory) as failed,
        explaining_memory(1, small_run("gpt", 3, train=train), lambda: None),
    ):
        np.empty(1 << 58)
    told = str(failed.value)
    assert told.startswith("rank 1 ran out of host memory")
    assert "micro_batch" not in told
    assert "zero.stage" not in told
    assert "a smaller model" in told
