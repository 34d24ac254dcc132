"""From a checkout of Megatron-LM to its `tools/preprocess_data.py` and `_fast.py`, ready to run.

Its current sources want Python 3.12 for `typing.override`, which is given to 3.11 here, and the
packages triton and transformers, the fast script also gigatoken; they run without a GPU.
"""

import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

SCRIPT = "tools/preprocess_data.py"
FAST_SCRIPT = "tools/preprocess_data_fast.py"
OVERRIDE = """import typing

if not hasattr(typing, "override"):
    typing.override = lambda method: method
"""


@dataclass(frozen=True, kw_only=True)
class Megatron:
    """A copy of the parts that are needed."""

    directory: Path
    commit: str
    python: str

    def command(self, lines: Path, prefix: Path, *, is_fast: bool = False) -> list[str]:
        """Give the command that writes `<prefix>_text_document.bin` and `.idx`.

        Args:
            lines: One file of JSON lines.
            prefix: Of the files to write.
            is_fast: Whether to take the script that encodes with gigatoken, in one process with
                all documents in memory.
        """
        return [
            self.python,
            str(self.directory / (FAST_SCRIPT if is_fast else SCRIPT)),
            f"--input={lines}",
            f"--output-prefix={prefix}",
            "--tokenizer-type=HuggingFaceTokenizer",
            f"--tokenizer-model={self.directory / 'tokenizer'}",
            "--append-eod",
            *(["--use-gigatoken"] if is_fast else ["--workers=2", "--partitions=1"]),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the command needs."""
        places = (self.directory / "override", self.directory)
        return {"PYTHONPATH": os.pathsep.join(map(str, places)), "PYTHONWARNINGS": "ignore"}


def copy_megatron(
    checkout: Path, directory: Path, tokenizer: Path, end_of_document: str, python: str
) -> Megatron:
    """Copy what `preprocess_data.py` needs out of a checkout, and a tokenizer in its form.

    Args:
        checkout: A git repository, bare or not, or a directory with the sources.
        directory: Where the copy goes; made here.
        tokenizer: A `tokenizer.json`.
        end_of_document: The token that closes a document.
        python: The interpreter with triton and transformers.
    """
    (directory / "override").mkdir(parents=True)
    (directory / "override" / "sitecustomize.py").write_text(OVERRIDE)
    (directory / "tokenizer").mkdir()
    shutil.copy(tokenizer, directory / "tokenizer" / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_document}
    (directory / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    git = ["git", "-C", str(checkout)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if found.returncode == 0:
        archive = [*git, "archive", "HEAD", "megatron", "tools"]
        data = subprocess.run(archive, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=BytesIO(data)) as archived:
            archived.extractall(directory, filter="data")
    else:
        for name in ("megatron", "tools"):
            shutil.copytree(checkout / name, directory / name)
    commit = found.stdout.strip() or "unknown"
    return Megatron(directory=directory, commit=commit, python=python)
