"""The verbs about a trained model: generate, evaluate, export."""

from pathlib import Path
from typing import Annotated

import typer

from launch.options import AsJson, DryRun

ModelDir = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A run, one of its checkpoints, or an exported directory."),
]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="A run, or one of its checkpoints.")]
Step = Annotated[
    int | None, typer.Option(metavar="N", help="Checkpoint of a run; default: the newest.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")]

GENERATE_EXAMPLES = """Examples:

  python -m launch generate runs/gpt --prompt "Once upon a time"

  python -m launch generate runs/gpt --prompt-file prompts.txt --temperature 0 --json

  echo "Chapter 1" | python -m launch generate runs/lstm --prompt-file - --top-p 0.9 --seed 7
"""
EVALUATE_EXAMPLES = """Examples:

  python -m launch evaluate runs/gpt

  python -m launch evaluate runs/gpt --text book.txt --text notes.jsonl --context 512 --json

  python -m launch evaluate runs/gpt --ngram 6

  python -m launch evaluate runs/gpt --tasks my_task --include tasks/
"""
EXPORT_EXAMPLES = """Examples:

  python -m launch export runs/gpt --output gpt-export

  python -m launch export runs/gpt --output gpt-export --format llama --dry-run
"""


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command(epilog=GENERATE_EXAMPLES)(generate)
    app.command(epilog=EVALUATE_EXAMPLES)(evaluate)
    app.command(epilog=EXPORT_EXAMPLES)(export)


def generate(
    directory: ModelDir,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue; may be given several times; none begins a document."),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt in each line; - reads stdin.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="New tokens at most; default: 128.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits; 0 takes the most likely token.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Draw from the K most likely tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Draw from the fewest tokens of probability P together."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    step: Step = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue prompts with a trained model, shown as it is drawn."""
    from launch.display import Display
    from launch.model_answers import open_directory, read_prompts, show_continuations
    from pipeline.config.explain import validate
    from pipeline.inference.generate import GenerationConfig

    config = validate(
        GenerationConfig,
        {
            "sampling": {"temperature": temperature, "top_k": top_k, "top_p": top_p},
            "max_tokens": max_tokens,
            "seed": seed,
        },
        "generate",
    )
    prompts = read_prompts(prompt or [], prompt_file)
    display = Display(as_json=as_json)
    loaded = open_directory(directory, step, device, display)
    show_continuations(loaded, prompts, config, display)


def evaluate(
    directory: ModelDir,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text, JSON lines or Parquet; may be given many times."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens read at once; default: as trained."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", help="New tokens of each further window; default: context / 2."),
    ] = None,
    ngram: Annotated[
        int | None,
        typer.Option(metavar="N", help="Also score a byte n-gram model of the training text."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness.")
    ] = None,
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory with task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task at most.")] = None,
    step: Step = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a trained model: loss and bits per byte of its validation split or of any text."""
    from launch.display import Display
    from launch.model_answers import (
        answer_tasks,
        check_options,
        open_directory,
        score_lines,
        score_ngram,
        score_text,
        trained_only,
    )

    display = Display(as_json=as_json)
    by_text = {"--text": text, "--context": context, "--stride": stride, "--ngram": ngram}
    check_options(tasks is not None, by_text, {"--include": include, "--limit": limit})
    loaded = open_directory(directory, step, device, display)
    if tasks is not None:
        answer_tasks(loaded, [name for name in tasks.split(",") if name], include, limit, display)
        return
    payload = score_text(loaded, text or [], context, stride)
    if ngram is not None:
        payload["ngram"] = score_ngram(trained_only(loaded, "--ngram"), text or [], ngram)
    display.answer(payload, score_lines(payload))


def export(
    directory: RunDir,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where to write; must not hold anything yet.")
    ],
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="auto|llama|gpt2|tandem",
            help="Class in transformers; auto takes Llama or GPT-2 where they are exact.",
        ),
    ] = "auto",
    step: Step = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write weights, config and tokenizer for `transformers`."""
    from typing import get_args

    from launch.display import Display
    from launch.model_answers import open_directory
    from pipeline.config.load import read_run
    from pipeline.errors import ConfigError
    from pipeline.inference.export import ExportFormat, check_target, export_model, plan_export
    from pipeline.inference.weights import find_run_dir

    if format_name not in get_args(ExportFormat):
        legal = ", ".join(get_args(ExportFormat))
        raise ConfigError(f"--format {format_name} is none of {legal}")
    display = Display(as_json=as_json)
    config = read_run(find_run_dir(directory)).model
    plan = plan_export(config, format_name)  # type: ignore[arg-type]
    check_target(output)
    payload = {"output": str(output), "format": plan.format, "reasons": list(plan.reasons)}
    notes = [f"  {reason}" for reason in plan.reasons]
    if dry_run:
        display.answer(payload, [f"would write {output} as {plan.format}", *notes])
        return
    loaded = open_directory(directory, step, "cpu", display)
    export_model(loaded, config, plan, output)
    code = ", trust_remote_code=True" if plan.format == "tandem" else ""
    load = f'AutoModelForCausalLM.from_pretrained("{output}"{code})'
    lines = [f"wrote {output} as {plan.format}", *notes, f"load it with: {load}"]
    display.answer(payload, lines)
