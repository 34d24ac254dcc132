"""From safetensors files to the tensors of a model, each checked before it is read.

The library's own reader trusts the size of the header that a file states; here it is bounded, and
every shape is compared with the model's before a byte of data is read.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.errors import CheckpointError

MAX_HEADER_BYTES = 16 << 20
"""Largest header that is read: room for about 100,000 tensors, some 150 bytes each. The format's
reference reader stops at 100 MB."""

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1,
}  # fmt: skip
"""Types that may stand in a file, by the format's names."""
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Types that a parameter may have."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a file, as the header describes it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read what tensors a safetensors file holds, and check that its size fits them.

    Args:
        path: The file.

    Returns:
        Entries by tensor name.

    Raises:
        CheckpointError: The file cannot be read, its header is larger than `MAX_HEADER_BYTES` or
            than the file, is not the JSON of the format, or describes more or fewer bytes than
            stand there.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            room = min(num_bytes - 8, MAX_HEADER_BYTES)
            if not 2 <= header_bytes <= room:
                raise CheckpointError(
                    f"{path} is not a safetensors file: it says that its header has {header_bytes} "
                    f"bytes; legal are 2 to {max(room, 2)} in a file of {num_bytes} bytes"
                )
            header = json.loads(file.read(header_bytes))
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"the header of {path} is not JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    data_bytes = num_bytes - 8 - header_bytes
    entries = {name: _read_entry(path, name, entry, data_bytes) for name, entry in header.items()}
    described = sum(DTYPE_BYTES[e.dtype] * math.prod(e.shape) for e in entries.values())
    if described != data_bytes:
        raise CheckpointError(
            f"{path} has {data_bytes} bytes of data, the tensors in its header need {described}; "
            "the file is cut off or damaged"
        )
    return entries


def _read_entry(path: Path, name: str, entry: Any, data_bytes: int) -> TensorEntry:
    where = f"tensor {name!r} in the header of {path}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} has other fields than dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where} has dtype {dtype!r}; legal: {', '.join(DTYPE_BYTES)}")
    if not _are_counts(shape):
        raise CheckpointError(f"{where} has shape {shape!r}, not a list of numbers from 0")
    begin_end = offsets if _are_counts(offsets) and len(offsets) == 2 else (0, -1)
    wanted = DTYPE_BYTES[dtype] * math.prod(shape)
    if begin_end[1] - begin_end[0] != wanted or begin_end[1] > data_bytes:
        raise CheckpointError(
            f"{where} has data_offsets {offsets!r}; its shape {shape} needs {wanted} bytes within "
            f"0 to {data_bytes}"
        )
    return TensorEntry(path=path, dtype=dtype, shape=tuple(shape))


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def read_headers(paths: Iterable[Path]) -> dict[str, TensorEntry]:
    """Read the headers of several files that together hold a model.

    Raises:
        CheckpointError: As `read_header`; or a tensor stands in two files.
    """
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        for name, entry in read_header(path).items():
            if name in entries:
                raise CheckpointError(f"tensor {name!r} stands in {entries[name].path} and {path}")
            entries[name] = entry
    return entries


def check_entries(
    entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], origin: str
) -> None:
    """Compare what files hold with what a model needs.

    Args:
        entries: From `read_headers`.
        shapes: Of the model's parameters, by name.
        origin: What the files belong to, for messages.

    Raises:
        CheckpointError: A tensor is missing, unknown, of another shape or not of floats.
    """
    missing = [name for name in shapes if name not in entries]
    unknown = [name for name in entries if name not in shapes]
    if missing or unknown:
        parts = [f"{name} is missing" for name in missing[:5]]
        parts += [f"{name} is no tensor of the model" for name in unknown[:5]]
        raise CheckpointError(
            f"{origin} does not hold this model: {'; '.join(parts)} ({len(missing)} missing, "
            f"{len(unknown)} unknown of {len(shapes)})"
        )
    for name, shape in shapes.items():
        entry = entries[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.path}: tensor {name} has shape {list(entry.shape)}, the model that its "
                f"config describes has {list(shape)}"
            )
        if entry.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{entry.path}: tensor {name} is of {entry.dtype}; legal: {', '.join(FLOAT_DTYPES)}"
            )


class TensorReader(Mapping[str, torch.Tensor]):
    """Checked tensors, each read from disk as float32 when asked for."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        """Take the entries of one or several files."""
        self._entries = entries

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._entries[name].path
        try:
            with safe_open(str(path), framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name).float()
        except (OSError, SafetensorError) as exc:
            raise CheckpointError(f"cannot read {name} from {path}: {exc}") from exc
        return tensor

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@torch.no_grad()
def fill_parameters(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into a model's parameters of the same names, one at a time.

    Raises:
        CheckpointError: A tensor is not finite.
    """
    for name, parameter in model.named_parameters():
        tensor = tensors[name]
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"tensor {name} is not finite; take an earlier checkpoint")
        parameter.copy_(tensor)
