"""The layers, the fences around third-party packages and the size limits, from the syntax trees."""

import ast
import fnmatch
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for top in ("pipeline", "launch") for path in (ROOT / top).rglob("*.py"))

LEVELS = {
    "pipeline": 0,
    "pipeline.errors": 1,
    "pipeline.config": 2,
    "pipeline.estimate": 3,
    "pipeline.data": 3,
    "pipeline.models": 3,
    "pipeline.tracking": 3,
    "pipeline.study": 4,
    "pipeline.training": 4,
    "pipeline.probes": 5,
    "pipeline.inference": 5,
    "launch": 6,
}
"""A package imports from lower levels and from itself; packages of one level are siblings."""

FENCES = {
    "ray": ("pipeline/data/ray_tasks.py", "launch/ray_*.py"),
    "deepspeed": ("pipeline/training/lean_deepspeed.py", "pipeline/training/zero_state.py"),
    "mlflow": ("pipeline/tracking/mlflow_*.py",),
    "tokenizers": ("pipeline/data/tokenizer.py",),
    "fastokens": ("pipeline/data/encoders.py",),
    "datasets": ("pipeline/data/huggingface.py",),
    "orjson": ("pipeline/data/jsonl.py", "pipeline/data/long_texts.py"),
    "msgspec": ("pipeline/data/long_texts.py",),
    "fsspec": ("pipeline/data/streams.py",),
    "datatrove": ("pipeline/data/filters.py",),
    "rensa": ("pipeline/data/signatures.py",),
    "plotly": ("pipeline/study/figures.py",),
    "transformers": ("pipeline/inference/modeling_tandem.py",),
    "lm_eval": ("pipeline/inference/lm_eval_adapter.py",),
    "torch": (
        *(f"pipeline/{name}/*.py" for name in ("models", "training", "probes", "inference")),
        "launch/doctor_agent.py",
    ),
}
"""Third-party package to the files that may import it."""

HEAVY = ("torch", "ray", "deepspeed", "mlflow")
NO_NOUN = ("utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py", "manager.py")
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "docs"} | {
    "pipeline", "launch", "configs", "tests", "docker",
}  # fmt: skip
MADE_BY_USE = {"runs", "build", "dist", "mlruns", "mlflow.db"}


def imports_of(path: Path) -> Iterator[str]:
    """Give every module that a file imports, at any depth, and those it imports by a string."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names if module == "pipeline")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rsplit(".", 1)[-1]
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value).partition(":")[0]


def layer_of(module: str) -> str:
    if module.partition(".")[0] == "launch":
        return "launch"
    return ".".join(module.split(".")[:2])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_layers_below_its_own(path: Path) -> None:
    own = layer_of(module_of(path))
    assert own in LEVELS, f"{name_of(path)} stands in no layer of the design"
    wrong = [
        module
        for module in imports_of(path)
        if module.partition(".")[0] in ("pipeline", "launch")
        and layer_of(module) != own
        and LEVELS.get(layer_of(module), 99) >= LEVELS[own]
    ]
    assert not wrong, f"{name_of(path)} ({own}) reaches above or beside its layer: {wrong}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_third_party_packages_are_imported_only_where_they_are_fenced(path: Path) -> None:
    for module in imports_of(path):
        allowed = FENCES.get(module.partition(".")[0], ("*",))
        matches = any(fnmatch.fnmatch(name_of(path), pattern) for pattern in allowed)
        assert matches, f"{name_of(path)} imports {module}; only {allowed} may"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 350, f"{name_of(path)} has more than 350 lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 80, f"{name_of(path)}: {node.name} has {length} lines, at most 80"


def test_files_are_named_by_their_noun_and_stand_one_level_deep() -> None:
    assert not [name_of(path) for path in FILES if path.name in NO_NOUN]
    assert not [name_of(path) for path in FILES if len(path.relative_to(ROOT).parts) > 3]


def test_the_top_level_holds_only_what_the_design_names() -> None:
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    extra = {name for name in found - TOP_LEVEL - MADE_BY_USE if not name.endswith(".egg-info")}
    assert not extra


def registries() -> Iterator[tuple[str, str]]:
    """Give every `"module:Name"` string that stands in a literal dict of an `__init__.py`."""
    for path in FILES:
        if path.name != "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            values = node.values if isinstance(node, ast.Dict) else []
            for value in values:
                if isinstance(value, ast.Constant) and ":" in str(value.value):
                    yield name_of(path), str(value.value)


def test_every_registry_entry_names_something_that_exists() -> None:
    """Those that name classes of a fenced package are built in the tests of their area."""
    entries = [entry for entry in registries() if entry[1].partition(".")[0] not in FENCES]
    assert entries
    for place, entry in entries:
        module, _, name = entry.partition(":")
        target = ROOT / (module.replace(".", "/") + ".py")
        assert target.is_file(), f"{place}: {entry} names no module"
        defined = {
            node.name
            for node in ast.parse(target.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert name in defined, f"{place}: {entry} names nothing in {name_of(target)}"


def loaded_by(statement: str) -> set[str]:
    """Run a statement in a fresh interpreter and give the top-level packages it loaded."""
    script = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    return {name.partition(".")[0] for name in json.loads(shown.stdout.splitlines()[-1])}


def modules_below(package: str) -> str:
    return ", ".join(module_of(path) for path in FILES if layer_of(module_of(path)) == package)


@pytest.mark.parametrize("package", ["pipeline.config", "pipeline.estimate", "pipeline.study"])
def test_a_laptop_package_loads_nothing_heavy(package: str) -> None:
    assert not loaded_by(f"import {modules_below(package)}") & set(HEAVY)


def test_the_command_line_loads_nothing_heavy_until_a_verb_runs() -> None:
    statement = "\n".join(
        [
            "from typer.testing import CliRunner",
            "from launch.cli import app",
            "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
        ]
    )
    assert not loaded_by(statement) & set(HEAVY)


def test_data_loads_no_torch() -> None:
    plain = [name for name in modules_below("pipeline.data").split(", ") if "ray" not in name]
    statement = f"import {', '.join(plain)}"
    assert "torch" not in loaded_by(statement)


@pytest.mark.slow
def test_a_rank_loads_neither_ray_nor_mlflow() -> None:
    statement = "import launch.worker, pipeline.training.train, pipeline.training.deepspeed_engine"
    assert not loaded_by(statement) & {"ray", "mlflow"}
