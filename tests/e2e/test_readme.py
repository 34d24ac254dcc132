"""Every command of the README is one that this project understands; a dry run proves it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
WITHOUT_DRY_RUN = ("doctor", "inspect", "verify", "ui")
KNOWN = (
    "source .venv/bin/activate",
    "bash launch/quickstart.sh",
    "bash launch/test.sh",
    "deepspeed --hostfile hosts.txt --master_addr node1"
    " --module launch.worker --run runs/gpt-hosts",
)
"""Commands that other tests or CI run: the scripts, and `deepspeed` in the launchers' contract."""


def commands() -> Iterator[str]:
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.strip()


def test_the_readme_opens_with_the_two_scripts() -> None:
    assert list(commands())[:2] == ["bash launch/quickstart.sh", "bash launch/test.sh"]


@pytest.mark.parametrize("command", [line for line in commands() if line not in KNOWN])
def test_a_command_of_the_readme_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command)
    if words[:3] == ["ray", "job", "submit"]:
        assert words[3:6] == ["--working-dir", ".", "--"]
        words = words[6:]
    assert words[:3] == ["python", "-m", "launch"], f"no test runs {command!r}"
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TANDEM_OUTPUT", str(tmp_path))
    verb, arguments = words[3], words[4:]
    if verb in WITHOUT_DRY_RUN:
        assert main([verb, "--help"]) == 0
        return
    (tmp_path / "my_corpus").mkdir()
    assert main([verb, *arguments, "--dry-run"]) == 0
