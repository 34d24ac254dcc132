"""A disk that ends the process after its k-th operation, with or without what was not synced."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal

from pipeline.training.checkpoint_store import Buffer, Disk

CRASHED = 99
"""Exit code of a process whose crash fired."""
Mutant = Literal["none", "no file sync", "no directory sync", "pointer first"]


class CrashingDisk(Disk):
    """Counts every operation that a crash can fall behind.

    A power loss takes back what no sync has covered: half of a file's bytes, the entry of a new
    file, a rename. Removals stay, the case that loses more. A mutant breaks the protocol here, on
    its way to the disk: that is how a test shows that it would see it broken. Nothing is really
    synced: what a sync would have saved is counted here, and no machine is cut off.
    """

    def __init__(
        self, crash_after: int | None = None, *, loses_unsynced: bool = False,
        mutant: Mutant = "none",
    ) -> None:  # fmt: skip
        self.operations: list[str] = []
        self._crash_after = crash_after
        self._loses_unsynced = loses_unsynced
        self._mutant = mutant
        self._unsynced_files: set[Path] = set()
        self._undo: dict[Path, list[Callable[[], object]]] = defaultdict(list)

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self._done(f"mkdir {path.name}")

    def write(self, path: Path, chunks: Iterable[Buffer]) -> None:
        is_new = not path.exists()
        with path.open("wb", buffering=0) as file:
            if is_new:
                self._undo[path.parent].append(lambda: path.unlink(missing_ok=True))
            self._done(f"create {path.name}")
            for chunk in chunks:
                file.write(chunk)
                self._unsynced_files.add(path)
                self._done(f"write {path.name}")

    def sync(self, path: Path) -> None:
        if path.is_dir():
            if self._mutant != "no directory sync":
                self._undo.pop(path, None)
        elif self._mutant != "no file sync":
            self._unsynced_files.discard(path)
        self._done(f"sync {path.name}")

    def begin_sync(self, path: Path) -> Callable[[], None]:
        # The worst case, and always the same: nothing is on the disk before it is waited for.
        return partial(self.sync, path)

    def rename(self, source: Path, target: Path) -> None:
        if self._mutant == "pointer first" and source.is_dir() and target.name.startswith("step-"):
            (target.parent / "latest").write_text(f"{target.name}\n")
            self._done("early latest")
        before = target.read_bytes() if target.is_file() else None
        super().rename(source, target)
        moved = {p for p in self._unsynced_files if source == p or source in p.parents}
        self._unsynced_files -= moved
        self._unsynced_files |= {target / p.relative_to(source) for p in moved}
        self._undo[target.parent].append(lambda: self._rename_back(source, target, before))
        self._done(f"rename {target.name}")

    def remove(self, path: Path) -> None:
        if path.is_dir():
            for entry in sorted(path.iterdir()):
                self.remove(entry)
            path.rmdir()
        elif path.exists():
            path.unlink()
        else:
            return
        self._done(f"remove {path.name}")

    def _rename_back(self, source: Path, target: Path, before: bytes | None) -> None:
        if target.exists():
            target.rename(source)
            if before is not None:
                target.write_bytes(before)

    def _done(self, operation: str) -> None:
        self.operations.append(operation)
        if len(self.operations) == self._crash_after:
            if self._loses_unsynced:
                self._lose()
            os._exit(CRASHED)

    def _lose(self) -> None:
        for path in self._unsynced_files:
            if path.exists():
                os.truncate(path, path.stat().st_size // 2)
        for undo in self._undo.values():
            for take_back in reversed(undo):
                take_back()
