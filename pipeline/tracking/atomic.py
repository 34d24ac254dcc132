"""From a text to a file that readers see whole or not at all."""

import os
from pathlib import Path


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file so that readers see the old content or all of the new, also after a crash.

    Args:
        path: The file; a temporary file stands beside it while writing.
        text: Its content, written as UTF-8.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
