"""The two scripts: a clear refusal without Python, and a second call that installs nothing."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "dirname", "cksum", "cat")


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_without_python_a_script_says_what_is_needed(tmp_path: Path, script: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shown = subprocess.run(
        ["bash", f"launch/{script}"], cwd=tmp_path, env={"PATH": str(tools)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 1
    assert "Python 3.11 or newer is needed" in shown.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(
    not (ROOT / ".venv" / "installed-test").exists(), reason="made by launch/test.sh"
)
def test_the_quickstart_script_reuses_the_installation_of_the_tests(tmp_path: Path) -> None:
    shown = subprocess.run(
        ["bash", "launch/quickstart.sh", "--dry-run", f"output_dir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "installing" not in shown.stdout
    assert "would run: deepspeed --num_accelerators 2" in shown.stdout
