"""Every line that depends on the device: choice, transfer, clocks, memory and peak arithmetic."""

import glob
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import ConfigError, LaunchError

PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "L40S": 362e12,
}
"""Dense bf16 tensor-core FLOPs per second by part of the device name, the longest match first.

Source: NVIDIA data sheets, halved where they state sparse figures:
https://www.nvidia.com/en-us/data-center/a100/ , https://www.nvidia.com/en-us/data-center/h100/ ,
https://www.nvidia.com/en-us/data-center/h200/ , https://www.nvidia.com/en-us/data-center/l40s/
"""


def resolve_device(accelerator: str, local_rank: int) -> torch.device:
    """Choose where a rank computes and make it the current device.

    Args:
        accelerator: auto takes CUDA where an NVIDIA device is present; cpu and cuda insist.
        local_rank: Rank on this host; picks the CUDA device.

    Raises:
        ConfigError: `accelerator` is none of the three.
        LaunchError: An NVIDIA device is wanted or present, and torch cannot use it.
    """
    if accelerator not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"accelerator={accelerator!r} is none of auto, cpu, cuda")
    if accelerator == "cpu" or (accelerator == "auto" and not nvidia_device_is_present()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError(_unusable_message(accelerator))
    count = torch.cuda.device_count()
    if local_rank >= count:
        # Ray and Slurm show each rank only its own device, as device 0.
        if count != 1:
            raise LaunchError(
                f"local rank {local_rank} has no device: {count} CUDA devices are visible"
            )
        local_rank = 0
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def nvidia_device_is_present(dev: Path = Path("/dev")) -> bool:
    """Tell whether the host shows an NVIDIA device, whatever torch can do with it.

    CUDA_VISIBLE_DEVICES set to nothing or -1 hides it on purpose; then it counts as absent.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "visible").strip() in ("", "-1"):
        return False
    return bool(glob.glob(str(dev / "nvidia[0-9]*"))) or _nvidia_smi_lists_a_device()


def _nvidia_smi_lists_a_device() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return any(line.startswith("GPU") for line in listed.stdout.splitlines())


def _unusable_message(accelerator: str) -> str:
    reason = "present" if accelerator == "auto" else "asked for"
    driver = Path("/proc/driver/nvidia/version")
    found = driver.read_text().splitlines()[0] if driver.exists() else "no NVIDIA kernel driver"
    wheel = f"torch {torch.__version__}"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only wheel"
    return (
        f"an NVIDIA device is {reason} but cannot be used: {wheel} is {built}; driver: {found}. "
        "Install the torch wheel that matches the driver (https://pytorch.org/get-started/locally/)"
        ", or ask for the CPU with accelerator=cpu or CUDA_VISIBLE_DEVICES=-1"
    )


def device_kind(device: torch.device) -> Literal["cpu", "cuda"]:
    """Name what a device is in the words of the cluster config."""
    return "cuda" if device.type == "cuda" else "cpu"


def device_name(device: torch.device) -> str:
    """Give the name of a device for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def check_precision(precision: str, family: str, device: torch.device) -> None:
    """Refuse number formats that this device cannot compute at a sensible speed.

    Raises:
        ConfigError: fp16 on a CPU, bf16 on a GPU without it, or a bf16 LSTM on a CPU that lacks
            the instructions; oneDNN then has no such primitive, or is 10 to 20 times slower.
    """
    if device.type == "cpu":
        if precision == "fp16":
            raise ConfigError(
                "precision=fp16 on a CPU is 10 to 20 times slower than fp32; nearest: bf16 or fp32"
            )
        if precision == "bf16" and "lstm" in family and not _cpu_has_bf16():
            raise ConfigError(
                f"precision=bf16 with model.family={family}: this CPU has neither AVX512-BF16 nor "
                "AMX, so oneDNN cannot run the LSTM in bf16; nearest: fp32"
            )
    elif precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"precision=bf16: {torch.cuda.get_device_name(device)} has no bf16; nearest: fp16"
        )


def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fused_optimizer(device: torch.device) -> bool:
    """Tell whether AdamW uses its fused kernel, which exists for CUDA parameters."""
    return device.type == "cuda"


def to_device(
    array: npt.NDArray[np.int64] | npt.NDArray[np.bool_], device: torch.device
) -> torch.Tensor:
    """Copy token ids or a mask to the device; on CUDA from pinned memory, without waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Laps:
    """Adds up the time of named phases of one step, without stopping the device in between."""

    def __init__(self, device: torch.device) -> None:
        """Start the clock of the first phase.

        Args:
            device: On CUDA events are recorded in its stream and read by `seconds`.
        """
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self.lap("start")

    def lap(self, name: str) -> None:
        """End a phase: what ran since the last call belongs to `name`."""
        if self._device.type == "cpu":
            self._marks.append((name, time.perf_counter()))
            return
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((name, event))

    def seconds(self) -> dict[str, float]:
        """Wait for the device and give the seconds of each phase."""
        synchronize(self._device)
        totals: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            on_cpu = self._device.type == "cpu"
            span = end - begin if on_cpu else begin.elapsed_time(end) / 1000.0
            totals[name] = totals.get(name, 0.0) + span
        return totals


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> int:
    """Begin a new measurement of peak memory.

    On CUDA the allocator's peak is reset. On a CPU the kernel's high-water mark VmHWM falls back
    to the present resident size, so that the peak includes what stands already: interpreter,
    torch and DeepSpeed.

    Returns:
        Bytes that stand at the reset: resident on a CPU, allocated on CUDA.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # Some containers mount /proc read-only; the peak then covers the whole process life.
        return resident_bytes()
    return resident_bytes()


def peak_memory(device: torch.device) -> dict[str, float]:
    """Give `memory/...` metrics of this rank since `reset_peak_memory`, in bytes.

    On CUDA `memory/reserved_bytes` is what the caching allocator took from the driver at most.
    """
    values = {"memory/resident_bytes": float(resident_bytes())}
    if device.type == "cuda":
        values["memory/peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
        values["memory/reserved_bytes"] = float(torch.cuda.max_memory_reserved(device))
        return values
    high_water = _status_bytes("VmHWM")
    if high_water is not None:
        values["memory/peak_bytes"] = float(high_water)
    return values


def peak_bytes(device: torch.device) -> float | None:
    """Give this rank's peak memory since `reset_peak_memory`, or None where it is not known."""
    return peak_memory(device).get("memory/peak_bytes")


def resident_bytes() -> int:
    """Resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _status_bytes(field: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Give the dense peak of one device in FLOPs per second, or None where it is not known.

    Only 16-bit formats are listed: fp32 runs use other units, at another peak.
    """
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [part for part in PEAK_BF16_FLOPS if part in name]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None
