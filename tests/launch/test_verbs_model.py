"""The verbs generate, evaluate and export on run directories with random weights."""

import io
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from pipeline.inference.ngram import ByteNgram
from pipeline.tracking.store import read_result
from tests.inference.cases import FAMILIES, TEXTS, make_run
from tests.launch.conftest import Cli

ROOT = Path(__file__).resolve().parents[2]
GREEDY = ("--temperature", "0", "--max-tokens", "6")


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("verbs"), FAMILIES["gpt"])[0]


def test_generate_answers_with_prompts_texts_and_tokens(cli: Cli, run_dir: Path) -> None:
    answer = cli("generate", run_dir, "--prompt", "The old", "--prompt", "A new", *GREEDY, "--json")
    assert answer.code == 0, answer.err
    first, second = answer.tree["continuations"]
    assert (first["prompt"], second["prompt"]) == ("The old", "A new")
    assert len(first["token_ids"]) == 6 or first["ended_document"]
    alone = cli("generate", run_dir, "--prompt", "A new", *GREEDY, "--json")
    assert alone.tree["continuations"] == [second]


def test_generate_shows_prompt_and_text(cli: Cli, run_dir: Path) -> None:
    expected = cli("generate", run_dir, "--prompt", "The old", *GREEDY, "--json").tree
    shown = cli("generate", run_dir, "--prompt", "The old", *GREEDY)
    text = expected["continuations"][0]["text"]
    assert shown.out == f"The old{text}\n"


def test_prompts_come_from_a_file_or_standard_input(
    cli: Cli, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("The old\n\n日本\n")
    by_file = cli("generate", run_dir, "--prompt-file", file, *GREEDY, "--json").tree
    assert [c["prompt"] for c in by_file["continuations"]] == ["The old", "", "日本"]
    stdin = io.TextIOWrapper(io.BytesIO(file.read_bytes()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert cli("generate", run_dir, "--prompt-file", "-", *GREEDY, "--json").tree == by_file


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--temperature", "-1"), 2, "temperature"),
        (("--temperature", "0", "--top-k", "4"), 2, "top_k and top_p would do nothing"),
        (("--top-p", "2"), 2, "top_p"),
        (("--max-tokens", "0"), 2, "max_tokens"),
        (("--max-tokens", "64"), 2, r"legal: max_tokens from 1 to 63"),
        (("--prompt", "word " * 99), 2, "no room in model.max_positions=64"),
        (("--step", "9"), 1, "no checkpoint of step 9; it has 1, 2"),
        (("--prompt-file", "nowhere.txt"), 2, "cannot read prompts from nowhere.txt"),
        (("--device", "tpu"), 2, "tpu"),
    ],
)
def test_generate_refuses_what_it_cannot_do(
    cli: Cli, run_dir: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    answer = cli("generate", run_dir, *options)
    assert answer.code == code
    assert message in answer.err


def test_prompts_that_are_no_text_are_refused(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in cli("generate", run_dir, "--prompt-file", tmp_path / "binary").err
    (tmp_path / "empty").write_bytes(b"")
    assert "holds no prompt" in cli("generate", run_dir, "--prompt-file", tmp_path / "empty").err


def test_evaluate_scores_the_validation_split_and_the_baseline(cli: Cli, run_dir: Path) -> None:
    answer = cli("evaluate", run_dir, "--ngram", "3", "--json")
    assert answer.code == 0, answer.err
    tree = answer.tree
    assert tree["text"] == "validation"
    assert math.isfinite(tree["loss"])
    documents = [text.encode() for text in TEXTS]
    expected = ByteNgram(documents, 3).bits_per_byte(documents)
    assert tree["ngram"]["bits_per_byte"] == pytest.approx(expected)
    lines = cli("evaluate", run_dir, "--ngram", "3").out
    assert f"{expected:.4f} bits per byte, Kneser-Ney of order 3" in lines


def test_evaluate_scores_files_by_a_stated_rule(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[0])
    tree = cli("evaluate", run_dir, "--text", tmp_path / "text.txt", "--json").tree
    assert (tree["context"], tree["stride"], tree["num_documents"]) == (16, 8, 1)
    assert tree["text_bytes"] == len(TEXTS[0].encode())
    whole = cli(
        "evaluate", run_dir, "--text", tmp_path / "text.txt", "--context", 64, "--stride", 64,
        "--json",
    ).tree  # fmt: skip
    assert whole["bits_per_byte"] != tree["bits_per_byte"]


def test_evaluate_refuses_options_that_contradict_each_other(cli: Cli, run_dir: Path) -> None:
    assert "--context and --stride go with --text" in cli("evaluate", run_dir, "--stride", 8).err
    answer = cli("evaluate", run_dir, "--tasks", "some", "--ngram", "3")
    assert (answer.code, "tasks alone" in answer.err) == (2, True)
    answer = cli("evaluate", run_dir, "--tasks", "some", "--context", "8", "--stride", "4")
    assert (answer.code, "give --context, --stride in another" in answer.err) == (2, True)
    answer = cli("evaluate", run_dir, "--limit", "3", "--include", "tasks")
    assert (answer.code, "--include, --limit would do nothing" in answer.err) == (2, True)


def test_export_writes_a_directory_that_the_other_verbs_read(
    cli: Cli, run_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "exported"
    planned = cli("export", run_dir, "--output", target, "--dry-run", "--json").tree
    assert planned["format"] == "llama"
    assert not target.exists()
    assert cli("export", run_dir, "--output", target).code == 0
    by_run = cli("generate", run_dir, "--prompt", "The", *GREEDY, "--json").tree
    assert cli("generate", target, "--prompt", "The", *GREEDY, "--json").tree == by_run
    answer = cli("evaluate", target)
    assert (answer.code, "needs a run's data" in answer.err) == (2, True)
    again = cli("export", run_dir, "--output", target)
    assert (again.code, "not empty" in again.err) == (2, True)
    wrong = cli("export", run_dir, "--output", tmp_path / "x", "--format", "gpt2", "--dry-run")
    assert (wrong.code, "model.positions=rope" in wrong.err) == (2, True)
    unknown = cli("export", run_dir, "--output", tmp_path / "x", "--format", "onnx")
    assert "none of auto, llama, gpt2, tandem" in unknown.err


def test_a_lost_tokenizer_is_named(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / "run"
    config = (copy / "run.yaml").read_text().replace(str(run_dir.parent), str(tmp_path / "copy"))
    (copy / "run.yaml").write_text(config)
    (tmp_path / "copy" / "shards" / "tokenizer.json").unlink()
    answer = cli("generate", copy)
    assert (answer.code, "tokenizer.json" in answer.err) == (1, True)


def documented_commands() -> list[str]:
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/inference.md")]
    pattern = r"python -m launch ((?:generate|evaluate|export) runs/[^\n`]+)"
    return sorted({command for text in texts for command in re.findall(pattern, text)})


@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_command_does_what_it_says(
    command: str, cli: Cli, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book.txt").write_text(TEXTS[0])
    write_task(tmp_path / "tasks", "my_task")
    monkeypatch.chdir(tmp_path)
    # The model of the test has 64 positions.
    words = shlex.split(command.replace("--context 512", "--context 32"))
    answer = cli(*[str(run_dir) if word == "runs/gpt" else word for word in words])
    assert answer.code == 0, answer.err


def write_task(directory: Path, name: str) -> None:
    source = ROOT / "tests" / "inference" / "tasks"
    directory.mkdir()
    text = (source / "rivers.yaml").read_text().replace("tandem_rivers", name)
    (directory / f"{name}.yaml").write_text(text.replace("RIVERS", str(source / "rivers.jsonl")))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "lstm_attention"])
def test_a_trained_run_scores_as_its_own_evaluation_did(
    family: str, tiny_run: Path, cli: Cli, tmp_path: Path
) -> None:
    overrides = [f"name=tiny-model-{family}", f"model.family={family}"]
    assert main(["train", str(tiny_run), *overrides]) == 0
    run_dir = tiny_run.parent / "runs" / f"tiny-model-{family}"
    metrics = read_result(run_dir).metrics
    score = cli("evaluate", run_dir, "--ngram", "4", "--json").tree
    assert score["loss"] == pytest.approx(metrics["eval/loss"].value, rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(
        metrics["eval/bits_per_byte"].value, rel=1e-5
    )  # fmt: skip
    assert 0.0 < score["ngram"]["bits_per_byte"] < 8.0
    text = cli("generate", run_dir, "--prompt", "sun moon", *GREEDY, "--json")
    assert json.loads(text.out)["continuations"][0]["token_ids"]
