"""What the verbs about a trained model read and show: prompts, generated text, scores."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.display import Display
    from pipeline.inference.generate import GenerationConfig
    from pipeline.inference.weights import LoadedModel, TrainedModel

STDIN = Path("-")


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Give the prompts of the command line and of a file; without any, one that is empty.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, or holds no line.
    """
    from pipeline.errors import ConfigError

    if file is None:
        return list(given) or [""]
    try:
        data = sys.stdin.buffer.read() if file == STDIN else file.read_bytes()
        text = data.decode("utf-8")
    except OSError as exc:
        raise ConfigError(f"cannot read prompts from {file}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"prompts in {file} are not UTF-8 text: {exc}") from exc
    if not text:
        raise ConfigError(f"{file} holds no prompt; write one in each line, an empty line for none")
    lines = text.removesuffix("\n").split("\n")
    return [*given, *(line.removesuffix("\r") for line in lines)]


def show_continuations(
    loaded: "LoadedModel", prompts: Sequence[str], config: "GenerationConfig", display: "Display"
) -> None:
    """Generate, and show one prompt's text as it comes, or the texts of several one by one."""
    from pipeline.inference.generate import continue_texts

    answers: dict[int, Any] = {}
    streams = len(prompts) == 1 and not display.as_json
    if streams:
        display.pass_on(prompts[0])
    for number, piece, state in continue_texts(loaded, prompts, config):
        answers[number] = state
        if streams:
            display.pass_on(piece)
    if streams:
        display.pass_on("\n")
        return
    continuations = [answers[number] for number in range(len(prompts))]
    display.answer(
        {"continuations": [asdict(state) for state in continuations]},
        [f"{state.prompt}{state.text}\n" for state in continuations],
    )


def check_options(
    has_tasks: bool, by_text: Mapping[str, object], by_tasks: Mapping[str, object]
) -> None:
    """Refuse options that the way of scoring would ignore.

    Args:
        has_tasks: Whether tasks are scored, and not a text.
        by_text: Options of scoring a text by name; None or empty where not given.
        by_tasks: Those of scoring tasks.

    Raises:
        ConfigError: Some of the other way are given; they are named.
    """
    from pipeline.errors import ConfigError

    ignored = by_text if has_tasks else by_tasks
    given = [name for name, value in ignored.items() if value not in (None, [])]
    if given and has_tasks:
        raise ConfigError(
            f"--tasks scores tasks alone; give {', '.join(given)} in another command, without it"
        )
    if given:
        raise ConfigError(f"{', '.join(given)} would do nothing without --tasks; name tasks by it")


def score_text(
    loaded: "LoadedModel", files: Sequence[Path], context: int | None, stride: int | None
) -> dict[str, Any]:
    """Score files, or the validation split where there are none.

    Raises:
        ConfigError: Context or stride is wrong, or goes with the validation split.
    """
    from pipeline.errors import ConfigError
    from pipeline.inference.evaluate import read_texts, score_documents, score_validation
    from pipeline.inference.weights import TrainedModel

    if not files:
        if context is not None or stride is not None:
            raise ConfigError(
                "--context and --stride go with --text; the validation split is scored in samples "
                "of train.sequence_tokens, as in training"
            )
        trained = trained_only(loaded, "scoring the validation split")
        return {"text": "validation", **asdict(score_validation(trained))}
    if context is None:
        context = loaded.model.max_positions
        if isinstance(loaded, TrainedModel):
            context = loaded.run.train.sequence_tokens
    if stride is None:
        stride = max(1, context // 2)
    score = score_documents(loaded, read_texts(files), context, stride)
    shown = {"text": [str(path) for path in files], "context": context, "stride": stride}
    return shown | asdict(score)


def score_ngram(trained: "TrainedModel", files: Sequence[Path], order: int) -> dict[str, Any]:
    """Score the baseline on the same text: a byte n-gram model of the run's training text."""
    from pipeline.inference.evaluate import read_texts, split_documents
    from pipeline.inference.ngram import ByteNgram

    baseline = ByteNgram(split_documents(trained, "train"), order)
    texts = (
        (text.encode() for text in read_texts(files))
        if files
        else split_documents(trained, "validation")
    )
    return {"order": order, "bits_per_byte": baseline.bits_per_byte(texts)}


def score_lines(payload: dict[str, Any]) -> list[str]:
    """Give scores for a person."""
    lines = [
        f"loss           {payload['loss']:.4f} nats per token over {payload['num_tokens']:,} tokens"
    ]
    if payload["bits_per_byte"] is not None:
        lines.append(
            f"bits per byte  {payload['bits_per_byte']:.4f} over {payload['text_bytes']:,} bytes"
        )
    if "ngram" in payload:
        baseline = payload["ngram"]
        lines.append(
            f"baseline       {baseline['bits_per_byte']:.4f} bits per byte, "
            f"Kneser-Ney of order {baseline['order']} over bytes of the training text"
        )
    return lines


def answer_tasks(
    loaded: "LoadedModel",
    names: Sequence[str],
    include: Path | None,
    limit: int | None,
    display: "Display",
) -> None:
    """Score tasks and show the scores.

    Raises:
        ConfigError: The harness is not installed.
    """
    from pipeline.errors import ConfigError

    try:
        from pipeline.inference.lm_eval_adapter import evaluate_tasks
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"--tasks needs lm-evaluation-harness, and {exc.name} is missing; "
            "install it with: pip install 'tandem-pretraining[eval]'"
        ) from exc
    scores = evaluate_tasks(loaded, names, include, limit)
    lines = [
        f"{task:24} {metric:24} {value:.4f}"
        for task, metrics in scores.items()
        for metric, value in metrics.items()
    ]
    display.answer({"tasks": scores}, lines)


def open_directory(
    directory: Path, step: int | None, device: str, display: "Display"
) -> "LoadedModel":
    """Load the model of a directory onto a device."""
    from pipeline.inference.open_model import open_model
    from pipeline.training.device import resolve_device

    return open_model(directory, step, resolve_device(device, 0), display.say)


def trained_only(loaded: "LoadedModel", what: str) -> "TrainedModel":
    """Give the model as one of a run.

    Raises:
        ConfigError: It was exported, and has no data of its own.
    """
    from pipeline.errors import ConfigError
    from pipeline.inference.weights import TrainedModel

    if not isinstance(loaded, TrainedModel):
        raise ConfigError(f"{what} needs a run's data, which an export lacks; name texts by --text")
    return loaded
