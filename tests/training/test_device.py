import os
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError, LaunchError
from pipeline.training.device import (
    Laps,
    check_precision,
    nvidia_device_is_present,
    peak_flops,
    peak_memory,
    reset_peak_memory,
    resolve_device,
)

CPU = torch.device("cpu")


@pytest.fixture
def visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def fake_nvidia_smi(directory: Path, output: str) -> None:
    """Put a real program of that name on the path, as the driver's package does."""
    script = directory / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{output}'\n")
    script.chmod(0o755)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is usable here")
def test_present_but_unusable_device_is_an_error_that_names_driver_and_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible_devices: None
) -> None:
    fake_nvidia_smi(tmp_path, "GPU 0: NVIDIA H100 (UUID: GPU-1)")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(LaunchError) as caught:
        resolve_device("auto", 0)
    assert f"torch {torch.__version__}" in str(caught.value)
    assert "driver" in str(caught.value)
    assert "CUDA_VISIBLE_DEVICES=-1" in str(caught.value)


def test_hidden_device_counts_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible_devices: None
) -> None:
    (tmp_path / "nvidia0").touch()
    assert nvidia_device_is_present(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not nvidia_device_is_present(tmp_path)
    assert resolve_device("auto", 0) == CPU


def test_tool_without_a_device_is_no_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible_devices: None
) -> None:
    fake_nvidia_smi(tmp_path, "No devices were found")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert not nvidia_device_is_present(tmp_path / "dev")


def test_unknown_accelerator_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of auto, cpu, cuda"):
        resolve_device("tpu", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is usable here")
def test_cuda_that_is_asked_for_and_absent_is_an_error() -> None:
    with pytest.raises(LaunchError, match="asked for"):
        resolve_device("cuda", 0)


def test_fp16_on_a_cpu_names_the_nearest_precision() -> None:
    with pytest.raises(ConfigError, match="nearest: bf16 or fp32"):
        check_precision("fp16", "gpt", CPU)


def test_bf16_lstm_needs_the_instructions_and_bf16_gpt_does_not() -> None:
    check_precision("bf16", "gpt", CPU)
    check_precision("fp32", "lstm_attention", CPU)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        check_precision("bf16", "lstm_attention", CPU)
    else:
        with pytest.raises(ConfigError, match="AVX512-BF16"):
            check_precision("bf16", "lstm_attention", CPU)


def test_peak_memory_begins_anew_at_the_reset() -> None:
    block = torch.ones(40_000_000)
    reset_peak_memory(CPU)
    before = peak_memory(CPU)["memory/peak_bytes"]
    del block
    reset_peak_memory(CPU)
    after = peak_memory(CPU)["memory/peak_bytes"]
    assert before - after > 100_000_000
    larger = torch.ones(60_000_000)
    assert peak_memory(CPU)["memory/peak_bytes"] - after > 200_000_000
    del larger
    assert peak_memory(CPU)["memory/peak_bytes"] - after > 200_000_000


def test_laps_add_up_by_name() -> None:
    laps = Laps(CPU)
    for _ in range(2):
        time.sleep(0.01)
        laps.lap("forward")
        laps.lap("backward")
    seconds = laps.seconds()
    assert seconds["forward"] >= 0.02
    assert seconds["backward"] < 0.01


def test_cpu_has_no_known_peak() -> None:
    assert peak_flops(CPU, "bf16") is None
