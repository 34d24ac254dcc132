"""Where checkpoints are kept: a few operations on files by name, here those of a directory.

Commit rules are in `checkpoint_commit`; `checkpoint_objects` has the same operations for an object
store.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class CheckpointStore(Protocol):
    """Files by name below one place; `/` parts a directory from its files."""

    @property
    def rename(self) -> Callable[[str, str], None] | None:
        """Move a file or directory in one step that survives a power loss; None if it cannot."""
        ...

    def write(self, files: Mapping[str, Iterable[Buffer]]) -> None:
        """Write files by name, each from its pieces, which are asked for one after another.

        They survive a power loss once this returns, or what holds them was moved.

        Raises:
            OSError: The disk refused.
            CheckpointError: The object store refused.
        """
        ...

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        """Fill a buffer with a file's bytes from an offset on; errors as `write`."""
        ...

    def entries(self, directory: str = "") -> dict[str, int]:
        """Give what stands directly in a directory, with files' sizes in bytes; {} if absent."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, or a directory with all in it; what is absent stays so."""
        ...


class Disk:
    """The operations that a power loss can fall between; a test records them and dies after one."""

    def make_directory(self, path: Path) -> None:
        """Make a directory; it may exist."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[Buffer]) -> None:
        """Write a file, which may be lost until `sync`."""
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)

    def sync(self, path: Path) -> None:
        """Force a file's bytes, or a directory's entries, to the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def begin_sync(self, path: Path) -> Callable[[], None]:
        """Begin to force a file to the disk beside what follows; the result waits until it is."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        done = pool.submit(self.sync, path)
        pool.shutdown(wait=False)
        return done.result

    def rename(self, source: Path, target: Path) -> None:
        """Move a file onto another or none, or a directory to where there is none."""
        source.rename(target)

    def remove(self, path: Path) -> None:
        """Remove a file or a directory with all in it."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class LocalStore:
    """A directory on a local or shared filesystem."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        """Keep files below `root`, which is made when first written to.

        Args:
            root: The directory.
            disk: Carries out the operations.
        """
        self.root = root
        self._disk = disk or Disk()

    def write(self, files: Mapping[str, Iterable[Buffer]]) -> None:
        """Write files; see `CheckpointStore`.

        The disk takes one in while the next is made: a sync after each would leave the processor
        idle, then the disk. The entry of a file in a directory of its own is forced to disk when
        `rename` moves that: a sync costs as much as some megabytes.
        """
        waits: list[Callable[[], None]] = []
        paths = {self.root / name: chunks for name, chunks in files.items()}
        try:
            for path, chunks in paths.items():
                self._make_parent(path)
                self._disk.write(path, chunks)
                waits.append(self._disk.begin_sync(path))
        finally:
            for wait in waits:
                wait()
        if any(path.parent == self.root for path in paths):
            self._disk.sync(self.root)

    def _make_parent(self, path: Path) -> None:
        if not self.root.is_dir():
            self._disk.make_directory(self.root)
            self._disk.sync(self.root.parent)
        if not path.parent.is_dir():
            self._disk.make_directory(path.parent)

    def rename(self, source: str, target: str) -> None:
        """Move a file or directory; see `CheckpointStore`."""
        if (self.root / source).is_dir():
            self._disk.sync(self.root / source)
        self._disk.rename(self.root / source, self.root / target)
        self._disk.sync((self.root / target).parent)

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        """Fill a buffer; see `CheckpointStore`."""
        path = self.root / name
        with path.open("rb", buffering=0) as file:
            file.seek(offset_bytes)
            filled = 0
            while filled < len(buffer):
                num_bytes = file.readinto(buffer[filled:])
                if not num_bytes:
                    raise OSError(f"{path} ends before byte {offset_bytes + len(buffer)}")
                filled += num_bytes

    def entries(self, directory: str = "") -> dict[str, int]:
        """List a directory; see `CheckpointStore`."""
        place = self.root / directory
        if not place.is_dir():
            return {}
        with os.scandir(place) as found:
            return {e.name: e.stat().st_size if e.is_file() else 0 for e in found}

    def remove(self, name: str) -> None:
        """Remove a file or directory; see `CheckpointStore`."""
        self._disk.remove(self.root / name)
