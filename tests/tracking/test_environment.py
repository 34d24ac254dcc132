"""Where the commit in `environment.json` comes from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHOW = """
import json
from pipeline.tracking.environment import collect_environment
print(json.dumps({k: v for k, v in collect_environment().items() if k.startswith("git")}))
"""


def collected_at(root: Path, stated: str) -> dict[str, str]:
    shown = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=root,
        env=os.environ | {"TANDEM_GIT_COMMIT": stated, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(shown.stdout))


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (COMMIT, {"git_commit": COMMIT}),
        (COMMIT[:12].upper() + "\n", {"git_commit": COMMIT[:12]}),
        ("a secret", {}),
        ("", {}),
    ],
)
def test_a_copy_without_checkout_takes_a_stated_commit_and_nothing_else(
    tmp_path: Path, stated: str, expected: dict[str, str]
) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "corpus")
    shutil.copytree(Path(pipeline.__file__).parent, tmp_path / "pipeline", ignore=ignore)
    assert collected_at(tmp_path, stated) == expected


def test_a_checkout_knows_its_commit_better_than_what_is_stated(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "corpus")
    shutil.copytree(Path(pipeline.__file__).parent, tmp_path / "pipeline", ignore=ignore)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for arguments in (["init", "-q"], ["add", "pipeline"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    expected = {"git_commit": head.stdout.strip(), "git_is_dirty": False}
    assert collected_at(tmp_path, COMMIT) == expected
