"""Reading configs: YAML, overrides, data files, the resolved dump and its hash."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

from pipeline.config import cluster, model, schema, study
from pipeline.config.load import (
    build_run,
    config_hash,
    dump_yaml,
    lineage_hash,
    load_cluster,
    load_run,
    load_study,
    read_run,
)
from pipeline.config.schema import RunConfig
from pipeline.config.tree import apply_overrides, merge, parse_yaml
from pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
GPT = "model: {family: gpt}\n"
STUDY = "name: s\nfamilies: {a: {model: {family: gpt}}}\nprobes: [{probe: p, params: {n: 1}}]\n"


def test_overrides_take_yaml_values(write_config: Callable[[str], Path]) -> None:
    run = load_run(
        write_config(GPT),
        [
            "train.optimizer.learning_rate=3e-4",
            "zero.stage=3",
            "eval.every_steps=null",
            "model.family=lstm_attention",
            "model.feed_forward=false",
            "data.source={kind: text, path: a=b.txt}",
            "name=2024-01-31",
        ],
    )
    assert run.train.optimizer.learning_rate == 3e-4
    assert run.zero.stage == 3
    assert run.eval.every_steps is None
    assert run.model.family == "lstm_attention"
    assert not run.model.feed_forward
    assert run.data.source.path == "a=b.txt"
    assert run.name == "2024-01-31"


def test_overrides_reach_into_lists(write_config: Callable[[str], Path]) -> None:
    comparison = load_study(
        write_config(STUDY),
        ["seeds=[3, 4]", "seeds.1=5", "probes.0.params.n=1e3", "families.a.model.width=64"],
    )
    assert comparison.seeds == [3, 5]
    assert comparison.probes[0].params == {"n": 1000.0}
    assert comparison.families["a"]["model"] == {"family": "gpt", "width": 64}


def test_overrides_leave_their_input_alone() -> None:
    tree = {"a": {"b": [1, 2]}}
    assert apply_overrides(tree, ["a.b.0=9", "a.c.d=1"]) == {"a": {"b": [9, 2], "c": {"d": 1}}}
    assert tree == {"a": {"b": [1, 2]}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("zero.stage", "is not of the form a.b=c"),
        ("=3", "is not of the form a.b=c"),
        ("zero..stage=3", "is not of the form a.b=c"),
        ("name.x=3", "name holds a value, not a section"),
        ("probes.1.probe=x", "1 is no entry of a list of 1"),
        ("probes.first.probe=x", "first is no entry of a list of 1"),
        ("seeds=[1", "is not valid YAML"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(
    override: str, message: str, write_config: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(write_config(STUDY), [override])
    assert message in str(caught.value)
    assert override in str(caught.value)


def test_merge_sets_leaves_and_keeps_the_rest() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": [1]}
    assert merge(base, {"a": {"c": 3}, "d": [2]}) == {"a": {"b": 1, "c": 3}, "d": [2]}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1]}


def test_data_names_a_file_that_overrides_can_reach_or_replace(
    tmp_path: Path, write_config: Callable[[str], Path]
) -> None:
    for name, size in (("small", 300), ("large", 4000)):
        (tmp_path / f"{name}.yaml").write_text(f"tokenizer: {{vocab_size: {size}}}")
    path = write_config(GPT + "data: small.yaml\n")
    assert load_run(path).data.tokenizer.vocab_size == 300
    assert load_run(path, ["data=large.yaml"]).data.tokenizer.vocab_size == 4000
    run = load_run(path, ["data.validation_fraction=0.5"])
    assert (run.data.tokenizer.vocab_size, run.data.validation_fraction) == (300, 0.5)
    shared = load_study(write_config(STUDY + "base: {data: small.yaml}\n"), ["base.seed=1"])
    assert shared.base == {"data": {"tokenizer": {"vocab_size": 300}}, "seed": 1}
    with pytest.raises(ConfigError, match="cannot read config absent.yaml: No such file"):
        load_run(path, ["data=absent.yaml"])


def test_directories_are_absolute_and_come_from_yaml_then_environment(
    tmp_path: Path, write_config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TANDEM_OUTPUT", raising=False)
    run = load_run(write_config(GPT))
    assert (run.output_dir, run.data.output_dir) == (tmp_path / "runs", tmp_path / "runs" / "data")
    monkeypatch.setenv("TANDEM_OUTPUT", str(tmp_path / "shared"))
    assert load_run(write_config(GPT)).output_dir == tmp_path / "shared"
    assert load_study(write_config(STUDY)).output_dir == tmp_path / "shared"
    assert load_run(write_config(GPT), ["output_dir=own"]).output_dir == tmp_path / "own"


def test_a_hostfile_stands_beside_its_cluster_file(
    tmp_path: Path, write_config: Callable[[str], Path]
) -> None:
    (tmp_path / "hosts").write_text("a slots=1\n")
    path = write_config("launcher: hostfile\nhostfile: hosts\n")
    assert load_cluster(path).hostfile == tmp_path / "hosts"
    assert load_cluster(None, ["num_workers=3"]).num_workers == 3


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.family=lstm_attention", "model.window_tokens=5", "eval.max_tokens=7"],
        ["name=1e-3", "data.source={kind: text, path: '2024-01-01'}", "tracking.uri='on'"],
        ["train.optimizer.epsilon=1e-12", "train.optimizer.weight_decay=0.1"],
    ],
)
def test_a_resolved_run_reads_back_equal(
    overrides: list[str], tmp_path: Path, write_config: Callable[[str], Path]
) -> None:
    quoted = [override.replace("name=1e-3", "name='1e-3'") for override in overrides]
    run = load_run(write_config(GPT), quoted)
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    again = read_run(tmp_path)
    assert again == run
    assert config_hash(again) == config_hash(run)


def test_a_missing_run_directory_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config .*run.yaml: No such file"):
        read_run(tmp_path / "absent")


def test_config_hash_ignores_the_place_and_changes_with_the_content() -> None:
    def hash_of(**fields: object) -> str:
        return config_hash(build_run({"model": {"family": "gpt"}, **fields}, "test"))

    base = hash_of()
    assert base == hash_of(name="other", output_dir="/elsewhere", tracking={"uri": "sqlite:///x"})
    assert base == hash_of(data={"output_dir": "/a", "prepared_dir": "/b"})
    changed = [
        hash_of(seed=1),
        hash_of(zero={"stage": 2}),
        hash_of(model={"family": "gpt", "width": 64}),
        hash_of(train={"optimizer": {"learning_rate": 2e-3}}),
        hash_of(data={"tokenizer": {"vocab_size": 300}}),
    ]
    assert len({base, *changed}) == 6


def test_hashes_of_runs_that_stand_already_stay(tmp_path: Path) -> None:
    """Written down from the code before runs could branch: directories of then still resume."""
    run = RunConfig.model_validate({"model": {"family": "gpt", "width": 64, "depth": 2}})
    assert config_hash(run).startswith("8dc62d88d044fcc320d0bd09968d4a0e")
    assert lineage_hash(run).startswith("06964f8cfffbe4371bd022ffbce072e1")
    fields = {"branch": {"run_dir": tmp_path, "step": 3}, "checkpoint": {"keep_steps": [4]}}
    branched = RunConfig.model_validate(run.model_dump() | fields)
    assert lineage_hash(branched) != lineage_hash(run)
    moved = {"branch": {"run_dir": tmp_path / "elsewhere", "step": 3}}
    assert config_hash(RunConfig.model_validate(branched.model_dump() | moved)) == config_hash(
        branched
    )


def test_lineage_hash_ignores_the_layout_that_a_resume_may_change() -> None:
    def hash_of(**fields: object) -> str:
        return lineage_hash(build_run({"model": {"family": "gpt"}, **fields}, "test"))

    assert hash_of() == hash_of(zero={"stage": 3}, checkpoint={"every_steps": 7}, name="other")
    assert hash_of() != hash_of(seed=1)


def test_configs_cannot_be_changed() -> None:
    run = build_run({"model": {"family": "gpt"}}, "test")
    for section, field in ((run, "seed"), (run.train, "total_tokens"), (run.model, "width")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' stands twice"),
        ("model: {family: gpt, family: gpt}", "key 'family' stands twice"),
        ("", "must hold a mapping, got NoneType"),
        ("- 1", "must hold a mapping, got list"),
        ("a: [1", "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("a: 0x_", "is not valid YAML"),
        ("? [1]\n: 2", "is not valid YAML"),
        ("a: " + "[" * 5000, "is nested more than 30 levels deep"),
        ("a: " + "[" * 40 + "]" * 40, "is nested more than 30 levels deep"),
        ("a: &a [*a]", "is nested more than 30 levels deep"),
        ("a: x" + "x" * 1_000_000, "at most 1000000"),
    ],
)
def test_a_file_that_is_no_config_is_refused(
    text: str, message: str, write_config: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(write_config(text))
    assert message in str(caught.value)


def test_aliases_that_stand_for_a_million_values_are_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for level in range(1, 6):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    with pytest.raises(ConfigError, match="stand for more than 100000 values"):
        parse_yaml("\n".join(lines), "bomb")
    assert parse_yaml("\n".join(lines[:3]), "small")["a2"][9][9][9] == 1


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_run(tmp_path)


def test_configs_and_the_model_registry_load_no_heavy_package() -> None:
    code = (
        "import sys, pipeline.config.load, pipeline.models\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'mlflow', 'numpy', 'scipy', 'datasets', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_model_is_the_one_field_of_a_run_without_a_default() -> None:
    required = [name for name, field in RunConfig.model_fields.items() if field.is_required()]
    assert required == ["model"]


@pytest.mark.parametrize("module", [cluster, model, schema, study], ids=lambda m: m.__name__)
def test_every_config_field_has_its_docstring_directly_below(module: ModuleType) -> None:
    silent = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(node, ast.ClassDef) or node.name == "ParameterCount":
            continue
        for field, below in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
            documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and not documented:
                silent.append(f"{node.name}.{ast.unparse(field.target)}")
    assert silent == []
