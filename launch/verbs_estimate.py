"""The verb that says what a run will take before anything starts: estimate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.options import AsJson, ClusterFile, NumWorkers, Overrides, RunRequest, load_request
from launch.verbs_run import RunFile

if TYPE_CHECKING:
    from rich.console import RenderableType

    from launch.display import Display
    from pipeline.config.schema import RunConfig
    from pipeline.estimate.forecast import Machines

SweepRange = Annotated[
    str | None,
    typer.Option("--sweep", metavar="nodes=1..128", help="Weak and strong scaling over hosts."),
]
Beside = Annotated[
    Path | None,
    typer.Option(
        "--beside",
        metavar="RUN",
        help="Run to sweep beside; else one of the other family is matched in size.",
    ),
]
Picture = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE.html", help="Draw the sweep as a page.")
]

MATCH_TOLERANCE = 0.02
"""Difference in non-embedding parameters that a matched run of the other family may have."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(estimate)


def estimate(
    config: RunFile,
    overrides: Overrides = None,
    cluster: ClusterFile = None,
    workers: NumWorkers = None,
    sweep: SweepRange = None,
    beside: Beside = None,
    picture: Picture = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take on a cluster: memory, speed, time, goodput and cost.

    Nothing is started. What is counted is marked =, what is modelled ~; docs/estimate.md has the
    model beside published figures.
    """
    from launch.display import Display

    request = load_request(config, overrides, cluster_file=cluster, num_workers=workers)
    display = Display(as_json=as_json)
    machines = stated_machines(request, cluster)
    if sweep is None:
        refuse_without_sweep(beside, picture)
        answer_forecast(display, request.run, machines)
        return
    answer_sweep(display, request.run, machines, sweep, beside, picture)


def stated_machines(request: RunRequest, cluster_file: Path | None) -> "Machines":
    """Give the ranks and the hardware of a request.

    Raises:
        ConfigError: The cluster states no hardware.
    """
    from pipeline.errors import ConfigError
    from pipeline.estimate.forecast import machines_of

    machines = machines_of(request.cluster, request.cluster.num_workers)
    if machines is None:
        shipped = Path(__file__).resolve().parent.parent / "configs" / "cluster"
        known = [path.name for path in sorted(shipped.glob("*.yaml")) if "hardware:" in
                 path.read_text(encoding="utf-8")]  # fmt: skip
        raise ConfigError(
            f"{cluster_file or 'no --cluster'}: `hardware` is not stated, and nothing is guessed; "
            f"name a cluster file that has it, as in configs/cluster/: {', '.join(known)}"
        )
    return machines


def answer_forecast(display: "Display", run: "RunConfig", machines: "Machines") -> None:
    """Show the forecast of one run, what to change if it does not fit, and the best layout."""
    from launch.estimate_errors import error_facts, error_lines
    from launch.estimate_page import (
        advice_lines,
        best_lines,
        candidate_facts,
        fit_table,
        forecast_facts,
        step_table,
        summary_lines,
    )
    from pipeline.estimate.forecast import forecast, vocab_size_of
    from pipeline.estimate.search import advise, search
    from pipeline.tracking.expectation import typical_errors

    vocab_size = vocab_size_of(run)
    found = forecast(run, vocab_size, machines)
    best = search(run, vocab_size, machines)
    advice = None if found.fit.is_enough else advise(run, vocab_size, machines, best)
    told = [] if advice is None else advice_lines(advice, machines.num_ranks)
    errors = typical_errors(run.output_dir, machines.hardware.device, run.model.family)
    display.answer(
        {
            "run": run.name,
            "device": machines.hardware.device,
            "num_workers": machines.num_ranks,
            **forecast_facts(found, machines),
            "advice": told,
            "best": candidate_facts(best),
            "errors": error_facts(errors),
        }
    )
    if display.as_json:
        return
    display.say(
        f"{run.name}: {found.num_parameters:,} parameters on {machines.num_ranks} ranks of "
        f"{machines.hardware.device}, ZeRO {run.zero.stage}, {run.precision}"
    )
    parts: list[RenderableType] = ["", fit_table(found.fit), *told, "", step_table(found.step), ""]
    for part in parts:
        display.show(part)
    for line in (*summary_lines(found, machines), *best_lines(best, found.step)):
        display.say(line)
    for line in error_lines(machines, run.model.family, errors):
        display.say(line)


def answer_sweep(
    display: "Display", run: "RunConfig", machines: "Machines", text: str,
    beside: Path | None, picture: Path | None,
) -> None:  # fmt: skip
    """Show the scaling of a run and one of the other family over numbers of hosts."""
    from launch.estimate_page import sweep_facts, sweep_page
    from pipeline.config.load import load_run
    from pipeline.estimate.forecast import vocab_size_of
    from pipeline.estimate.sweep import parse_range, sweep

    node_counts = parse_range(text)
    vocab_size = vocab_size_of(run)
    other = counterpart(run, vocab_size) if beside is None else load_run(beside)
    first, second = sweep_labels(run, other)
    runs = {first: run, second: other}
    vocab_sizes = {
        first: vocab_size, second: vocab_size if beside is None else vocab_size_of(other)
    }  # fmt: skip
    found = sweep(runs, vocab_sizes, machines.hardware, node_counts, machines.threads_per_rank)
    answer: dict[str, Any] = {"device": machines.hardware.device, **sweep_facts(found)}
    if picture is not None:
        from pipeline.study.sweep_figure import write_sweep

        write_sweep(found, picture)
        answer["picture"] = str(picture)
    display.answer(answer)
    if display.as_json:
        return
    labels = {label: describe_model(one, vocab_sizes[label]) for label, one in runs.items()}
    for part in sweep_page(found, labels):
        display.show(part)
    if picture is not None:
        display.say(f"picture: {picture}")


def counterpart(run: "RunConfig", vocab_size: int) -> "RunConfig":
    """Give the same run with a model of the other family, of the same non-embedding parameters.

    Raises:
        ConfigError: No width comes close enough; `--beside` names a run instead.
    """
    from pipeline.config.study import MatchConfig
    from pipeline.study.match import match_model

    model = run.model
    family = "lstm_attention" if model.family == "gpt" else "gpt"
    fields = {
        "family": family,
        "depth": model.depth,
        "heads": model.heads,
        "vocab_size": model.vocab_size,
        "max_positions": model.max_positions,
        "tied_head": model.tied_head,
        "activation": model.activation,
    }
    match = MatchConfig(
        reference=family, quantity="non_embedding_parameters", tolerance_fraction=MATCH_TOLERANCE
    )
    target = model.num_parameters(vocab_size).non_embedding
    found = match_model(family, fields, target, match, vocab_size)
    return run.model_copy(update={"model": found.model})


def sweep_labels(run: "RunConfig", other: "RunConfig") -> tuple[str, str]:
    """Name two runs by their families, else by their names, else by their places."""
    for first, second in ((run.model.family, other.model.family), (run.name, other.name)):
        if first != second:
            return first, second
    return run.name, f"{other.name} (beside)"


def describe_model(run: "RunConfig", vocab_size: int) -> str:
    """Say the shape and size of a run's model in a line."""
    count = run.model.num_parameters(vocab_size).total
    return (
        f"{count / 1e6:,.1f} M parameters, width {run.model.width}, depth {run.model.depth}, "
        f"{run.train.sequence_tokens} tokens a sample, {run.train.global_batch_tokens:,} a step"
    )


def refuse_without_sweep(beside: Path | None, picture: Path | None) -> None:
    """Refuse options that belong to a sweep.

    Raises:
        ConfigError: One of them is given.
    """
    from pipeline.errors import ConfigError

    if beside is not None or picture is not None:
        raise ConfigError("--beside and --picture belong to a sweep; add --sweep nodes=1..8")


def refuse_unless_it_fits(request: RunRequest, *, force: bool) -> None:
    """Refuse a run that its machines' memory cannot hold; where their memory is unknown, do not.

    Args:
        request: The run and its cluster.
        force: Whether to go on regardless.

    Raises:
        ConfigError: It does not fit; with the table, and what to change.
    """
    from launch.estimate_page import advice_lines, fit_lines
    from pipeline.errors import ConfigError
    from pipeline.estimate.forecast import MEMORY_ERROR_FRACTION, predict_fit, vocab_size_of
    from pipeline.estimate.search import advise, search

    run = request.run
    # The size of a vocabulary that is still to be loaded is not known either.
    is_unknown = run.model.vocab_size is None and run.data.tokenizer.path is not None
    if request.cluster.hardware is None or force or is_unknown:
        return
    machines = stated_machines(request, None)
    vocab_size = vocab_size_of(run)
    fit = predict_fit(run, vocab_size, machines)
    if fit.needed_bytes <= (1.0 + MEMORY_ERROR_FRACTION) * fit.capacity_bytes:
        return
    try:
        advice = advise(run, vocab_size, machines, search(run, vocab_size, machines))
        changes = advice_lines(advice, machines.num_ranks)
    except ConfigError as exc:
        changes = [f"what would fit cannot be said: {exc}"]
    told = "\n".join([*fit_lines(fit), *changes])
    raise ConfigError(f"{run.name} cannot fit; --force starts it all the same\n{told}")
