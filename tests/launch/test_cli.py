"""The command line refuses what is wrong with a message and the right exit code, at once."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_help_answers_within_a_second() -> None:
    durations = []
    for _ in range(4):
        started = time.perf_counter()
        shown = subprocess.run(
            [sys.executable, "-m", "launch", "--help"], cwd=ROOT, capture_output=True, check=True
        )
        durations.append(time.perf_counter() - started)
        assert b"quickstart" in shown.stdout
    assert min(durations) < 1.0


def test_help_names_every_verb(cli) -> None:
    shown = cli("--help")
    verbs = "quickstart study report prepare inspect verify init train sync ui submit doctor"
    assert shown.code == 0
    assert all(f"  {verb} " in shown.out for verb in verbs.split())


def test_an_unknown_verb_is_wrong_usage(cli) -> None:
    shown = cli("trane", "run.yaml")
    assert shown.code == 2
    assert "trane" in shown.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.total_tokns=128", "did you mean train.total_tokens"),
        ("no-equals-sign", "not of the form a.b=c"),
        ("train.global_batch_tokens=100", "nearest"),
        ("zero.stage=4", "nearest: 3"),
        ("model.max_positions=16", "nearest: train.sequence_tokens=16"),
        ("precision=fp16", "nearest: bf16 or fp32"),
        ("cluster.num_workers=3", "nearest"),
        ("cluster.num_wrkers=2", "did you mean num_workers"),
        ("cluster.launcher=slurm", "'local', 'ray' or 'hostfile'"),
        ("cluster.launcher=hostfile", "needs cluster.hostfile"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_starts(
    cli, tiny_run: Path, tmp_path: Path, override: str, message: str
) -> None:
    shown = cli("train", tiny_run, f"output_dir={tmp_path}", "cluster.accelerator=cpu", override)
    assert shown.code == 2
    assert shown.err.startswith("ConfigError: ")
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not list(tmp_path.iterdir())


def test_a_machine_without_a_gpu_may_send_fp16_to_a_cluster_that_has_some(
    cli, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    arguments = ["train", tiny_run, "precision=fp16", "--dry-run"]
    assert cli(*arguments, "--launcher", "local").code == 2
    assert cli(*arguments, "--launcher", "ray").code == 0
    assert cli(*arguments, "--launcher", "ray", "cluster.accelerator=cpu").code == 2


@pytest.mark.parametrize("verb", ["train", "init", "prepare", "study"])
def test_a_missing_config_file_is_named(cli, tmp_path: Path, verb: str) -> None:
    shown = cli(verb, tmp_path / "absent.yaml")
    assert shown.code == 2
    assert f"{tmp_path}/absent.yaml" in shown.err


def test_a_missing_hostfile_is_an_error_and_not_a_local_run(cli, tiny_run: Path) -> None:
    shown = cli("train", tiny_run, "--launcher", "hostfile", "cluster.hostfile=absent.txt")
    assert shown.code == 2
    assert "absent.txt" in shown.err


def test_a_run_directory_of_another_config_is_refused_with_the_difference(
    cli, tiny_run: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "tiny"
    directory.mkdir()
    other = yaml.safe_load(tiny_run.read_text()) | {"seed": 7}
    (directory / "run.yaml").write_text(yaml.safe_dump(other))
    shown = cli("train", tiny_run, f"output_dir={tmp_path}")
    assert shown.code == 2
    assert "belongs to another config" in shown.err
    assert "seed: 7 -> 0" in shown.err


@pytest.mark.parametrize("verb", ["train", "init", "study", "prepare"])
def test_a_ray_job_that_names_no_output_is_refused(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    config = tmp_path / "config.yaml"
    config.write_text("model: {family: gpt}" if verb != "study" else "name: s")
    shown = cli(verb, config)
    assert shown.code == 2
    assert "output_dir=" in shown.err


def test_inside_a_ray_job_the_launcher_is_ray_unless_the_cluster_names_one(
    cli, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("TANDEM_OUTPUT", str(tmp_path))
    shown = cli("train", tiny_run, "--dry-run", "--json")
    assert shown.tree["cluster"]["launcher"] == "ray"
    shown = cli("train", tiny_run, "--dry-run", "--json", "--launcher", "local")
    assert shown.tree["cluster"]["launcher"] == "local"


def write_text(directory: Path, name: str, content: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(content)
    return directory / name


BAD_TEXT = {
    "an empty file": ("jsonl", "empty.jsonl", "", "empty.jsonl"),
    "a line without text": ("jsonl", "bad.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "bad.jsonl:2"),
    "invalid JSON": ("jsonl", "bad.jsonl", '{"text": "a"}\n{"text": \n', "bad.jsonl:2"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_unusable_text_is_refused_with_file_and_line(
    cli, tiny_run: Path, tmp_path: Path, case: str
) -> None:
    kind, name, content, place = BAD_TEXT[case]
    path = write_text(tmp_path / "text", name, content)
    overrides = [f"data.source.kind={kind}", f"data.source.path={path}"]
    shown = cli("train", tiny_run, f"output_dir={tmp_path / 'runs'}", *overrides)
    assert shown.code == 1
    assert shown.err.startswith("DataError: ")
    assert place in shown.err
    assert not list((tmp_path / "runs").rglob("manifest.json"))
    assert not list((tmp_path / "runs").rglob("run.yaml"))


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_missing_or_empty_place_is_refused(
    cli, tiny_run: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "nothing").mkdir()
    for path in (tmp_path / "absent", tmp_path / "nothing"):
        overrides = [f"data.source.kind={kind}", f"data.source.path={path}"]
        shown = cli("prepare", tiny_run, f"output_dir={tmp_path / 'runs'}", *overrides)
        assert shown.code == 1
        assert str(path) in shown.err


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_directory_without_shards_names_the_command_that_makes_them(
    cli, tmp_path: Path, verb: str
) -> None:
    shown = cli(verb, tmp_path)
    assert shown.code == 1
    assert "python -m launch prepare" in shown.err


def test_a_dry_run_shows_the_plan_and_starts_nothing(cli, tiny_run: Path, tmp_path: Path) -> None:
    arguments = [tiny_run, "--dry-run", f"output_dir={tmp_path}"]
    trained = cli("train", *arguments, "--workers", "2", "--json").tree
    assert trained["batches"]["accumulation_steps"] == 1
    assert trained["batches"]["total_steps"] == 6
    assert trained["command"][:3] == ["deepspeed", "--num_accelerators", "2"]
    assert cli("init", *arguments, "--json").tree["run_dir"] == str(tmp_path / "tiny")
    assert cli("prepare", *arguments, "--json").tree["data"]["tokenizer"]["vocab_size"] == 300
    shown = cli("train", *arguments)
    assert "would run: deepspeed" in shown.out
    assert "total_steps 6" in shown.out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_prepare_says_what_it_would_read_and_where_shards_would_stand(
    cli, tiny_run: Path, tmp_path: Path
) -> None:
    texts = [
        write_text(tmp_path / "text", name, '{"text": "one two three"}\n' * number)
        for number, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl"), start=1)
    ]
    place = str(texts[0].parent)
    overrides = [f"data.source.path={place}", f"data.output_dir={tmp_path / 'data'}"]
    facts = cli("prepare", tiny_run, *overrides, "--dry-run", "--json").tree
    assert facts["sources"] == {
        "jsonl": {"kind": "jsonl", "paths": [place], "num_files": 3, "file_bytes": 6 * 26}
    }
    assert sum(text.stat().st_size for text in texts) == 6 * 26
    assert facts["tokenizer"].startswith("byte-level BPE of 300 entries")
    assert facts["is_prepared"] is False
    assert not (tmp_path / "data").exists()
    directory = Path(facts["directory"])
    directory.mkdir(parents=True)
    (directory / "manifest.json").touch()
    shown = cli("prepare", tiny_run, *overrides, "--dry-run")
    assert shown.code == 0
    assert f"{directory}\n" in shown.out
    assert "is_prepared          True" in shown.out
    assert f"source               jsonl: jsonl {place}, 3 files, 0.2 kB\n" in shown.out
    shown = cli("prepare", tiny_run, f"data.source.path={tmp_path / 'absent'}", "--dry-run")
    assert shown.code == 1
    assert shown.err.startswith("DataError: ")
    assert "absent" in shown.err


def test_a_dry_run_of_prepare_shows_every_source_and_contacts_no_hub(cli, tmp_path: Path) -> None:
    lines = write_text(tmp_path / "web", "a.jsonl", '{"text": "one"}\n')
    table = tmp_path / "code.parquet"
    pq.write_table(pa.table({"text": ["two", "three"]}), table)
    sources: dict[str, Any] = {
        "web": {"kind": "jsonl", "path": [str(lines), str(tmp_path / "absent.jsonl")]},
        "code": {"kind": "parquet", "path": str(table)},
        "made": {"kind": "synthetic"},
    }
    run = {"output_dir": str(tmp_path / "out"), "model": {"family": "gpt"}}
    path = tmp_path / "run.yaml"

    def preview(sources: dict[str, Any]) -> dict[str, Any]:
        path.write_text(yaml.safe_dump(run | {"data": {"sources": sources}}))
        return cli("prepare", path, "--dry-run", "--json").tree

    facts = preview(sources)
    found = {
        name: (told["num_files"], told["file_bytes"]) for name, told in facts["sources"].items()
    }
    assert found == {"web": (2, 16), "code": (1, table.stat().st_size), "made": (0, 0)}
    assert facts["directory"].startswith(str(tmp_path / "out" / "data"))
    hub = {"kind": "huggingface", "path": "somebody/stories"}
    facts = preview(sources | {"hub": hub})
    assert facts["sources"]["hub"] == {"kind": "huggingface", "paths": ["somebody/stories"]}
    assert facts["sources"]["code"]["num_files"] == 1
    assert (facts["below"], "directory" in facts) == (str(tmp_path / "out" / "data"), False)
    shown = cli("prepare", path, "--dry-run")
    assert "made: synthetic\n" in shown.out
    assert "hub: huggingface somebody/stories, not downloaded for a dry run\n" in shown.out


@pytest.mark.slow
def test_a_run_with_too_little_text_is_refused_before_its_directory_stands(
    cli, tiny_run: Path, tmp_path: Path
) -> None:
    overrides = [f"data.output_dir={tiny_run.parent / 'runs' / 'data'}", f"output_dir={tmp_path}"]
    large = ["train.global_batch_tokens=16384", "train.total_tokens=16384"]
    for verb in ("init", "train"):
        shown = cli(verb, tiny_run, *overrides, *large)
        assert shown.code == 1
        assert "fewer than one global batch" in shown.err
    shown = cli("init", tiny_run, *overrides, "model.vocab_size=280")
    assert shown.code == 2
    assert "model.vocab_size=280" in shown.err
    assert not (tmp_path / "tiny").exists()


def test_a_study_dry_run_lists_its_cells(cli, tmp_path: Path) -> None:
    shown = cli("quickstart", "--dry-run", "--json", f"output_dir={tmp_path}")
    assert shown.code == 0
    assert len(shown.tree["cells"]) >= 4
    assert shown.tree["directory"] == str(tmp_path / "quickstart")
    assert not list(tmp_path.iterdir())


def test_each_launcher_shows_its_command(cli, tiny_run: Path, tmp_path: Path) -> None:
    hosts = write_text(tmp_path, "hosts", "one slots=1\ntwo slots=1\n")
    shown = cli(
        "init", tiny_run, "--dry-run", "--json", "--workers", "2", "--launcher", "hostfile",
        f"cluster.hostfile={hosts}", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert shown.tree["command"] == [
        "deepspeed", "--hostfile", str(hosts), "--master_addr", "one", "--master_port", "29500",
        "--module", "launch.worker", "--run", str(tmp_path / "tiny"),
    ]  # fmt: skip
    shown = cli("init", tiny_run, "--dry-run", "--json", "--launcher", "ray")
    assert shown.tree["command"][-4:] == ["--launcher", "ray", "--workers", "1"]


def test_submit_refuses_what_a_job_would_not_get(cli, tmp_path: Path) -> None:
    outside = write_text(tmp_path, "run.yaml", "model: {family: gpt}")
    shown = cli("submit", "train", outside, "--dry-run")
    assert shown.code == 2
    assert "is not among the files" in shown.err
    shown = cli("submit", "erase", outside, "--dry-run")
    assert shown.code == 2


def test_submit_passes_overrides_and_options_on(cli) -> None:
    config = ROOT / "configs" / "run" / "gpt.yaml"
    shown = cli("submit", "train", config, "seed=3", "--workers", "2", "--dry-run", "--json")
    assert shown.tree["command"] == (
        "python -m launch train configs/run/gpt.yaml seed=3 --workers 2"
    )


def test_sync_and_ui_refuse_places_without_runs(cli, tmp_path: Path) -> None:
    assert cli("sync", tmp_path / "absent").code == 2
    shown = cli("ui", tmp_path)
    assert shown.code == 1
    assert "no tracking store" in shown.err


def test_report_refuses_a_directory_that_is_no_study(cli, tmp_path: Path) -> None:
    shown = cli("report", tmp_path)
    assert shown.code == 2
    assert "study.yaml" in shown.err


def test_json_answers_are_json_alone(cli, tiny_run: Path) -> None:
    assert isinstance(json.loads(cli("train", tiny_run, "--dry-run", "--json").out), dict)
