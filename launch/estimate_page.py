"""From forecasts and sweeps to what `estimate` answers: plain values, and tables for a terminal.

In the tables `=` marks what is counted and tested equal, `~` what is modelled.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launch.display import format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from pipeline.estimate.forecast import Fit, Forecast, Machines
    from pipeline.estimate.search import Advice, Candidate
    from pipeline.estimate.step_time import StepTime
    from pipeline.estimate.sweep import Sweep, SweepPoint

GIB = 2.0**30
MARKS = {True: "=", False: "~"}
SHARE_SHOWN = 0.0005
"""Parts of a step below it are left out of the table."""

PARTS = {
    "products": "matrix products",
    "attention": "attention",
    "recurrence": "recurrent steps, one after another",
    "between": "norms, activations, loss",
    "dispatch": "waiting for the host",
    "update": "optimizer",
    "exposed": "communication that nothing hides",
    "data_wait": "reading tokens",
}
"""Fields of `StepTime` that add up to the step, and what a person reads."""


def forecast_facts(found: "Forecast", machines: "Machines") -> dict[str, Any]:
    """Give a forecast as plain values."""
    step = found.step
    return {
        "fits": found.fit.is_enough,
        "memory": fit_facts(found.fit),
        "step": step_facts(step),
        "tokens_per_second": step.tokens_per_second,
        "tokens_per_second_per_worker": step.tokens_per_second / machines.num_ranks,
        "mfu_fraction": found.mfu_fraction,
        "flops_per_token": found.flops_per_token,
        "num_parameters": found.num_parameters,
        "dependent_operations": found.dependent_operations,
        "accumulation_steps": found.plan.accumulation_steps,
        "goodput": asdict(found.goodput),
        "seconds": found.seconds,
        "cost": None if found.cost is None else asdict(found.cost),
    }


def fit_facts(fit: "Fit") -> dict[str, Any]:
    """Give a memory table as plain values."""
    return {
        "needed_bytes": fit.needed_bytes,
        "capacity_bytes": fit.capacity_bytes,
        "components": [asdict(component) for component in fit.table],
    }


def step_facts(step: "StepTime") -> dict[str, Any]:
    """Give a step as plain values; all are modelled."""
    return {f"{name}_seconds": getattr(step, name) for name in PARTS} | {
        "step_seconds": step.seconds,
        "recurrence_floor_seconds": step.recurrence_floor,
        "communication_seconds": step.communication,
    }


def candidate_facts(found: "Candidate | None") -> dict[str, Any] | None:
    """Give a layout that was found as plain values."""
    if found is None:
        return None
    return {
        "layout": asdict(found.layout),
        "overrides": found.layout.overrides,
        "accumulation_steps": found.accumulation_steps,
        "needed_bytes": found.fit.needed_bytes,
        "step_seconds": found.step.seconds,
        "tokens_per_second": found.step.tokens_per_second,
    }


def sweep_facts(found: "Sweep") -> dict[str, Any]:
    """Give a sweep as plain values."""
    points = [
        {
            "label": point.label,
            "scaling": point.scaling,
            "num_nodes": point.num_nodes,
            "num_ranks": point.num_ranks,
            "micro_batch_samples": point.micro_batch_samples,
            "tokens_per_second": point.step.tokens_per_second,
            "efficiency_fraction": point.efficiency_fraction,
            "chain_fraction": point.chain_fraction,
            "exposed_fraction": point.exposed_fraction,
            "fits": point.fits,
            **step_facts(point.step),
        }
        for point in found.points
    ]
    return {"points": points, "gaps": [asdict(gap) for gap in found.gaps]}


def fit_title(fit: "Fit") -> str:
    """Say in a line whether it fits."""
    verdict = "fits" if fit.is_enough else "DOES NOT FIT"
    needed, there = fit.needed_bytes / GIB, fit.capacity_bytes / GIB
    return f"memory of a rank: {verdict}, {needed:.2f} of {there:.2f} GiB"


def fit_table(fit: "Fit") -> "Table":
    """Lay out what fills a rank's memory."""
    table = _new_table(fit_title(fit), ("", "left"), ("GiB", "right"), ("", "left"), ("", "left"))
    for component in fit.table:
        where = "" if component.place == "device" else " (host)"
        table.add_row(
            f"{component.name}{where}", f"{component.bytes / GIB:.3f}", MARKS[component.exact],
            component.note,
        )  # fmt: skip
    return table


def fit_lines(fit: "Fit") -> list[str]:
    """Give the memory table as plain lines, for an error message."""
    rows = [
        f"  {component.name:28} {component.bytes / GIB:9.3f} GiB  {MARKS[component.exact]}"
        for component in fit.table
    ]
    return [fit_title(fit), *rows]


def step_table(step: "StepTime") -> "Table":
    """Lay out where the time of a step goes."""
    title = f"one step: {1e3 * step.seconds:,.1f} ms, modelled"
    table = _new_table(title, ("", "left"), ("ms", "right"), ("share", "right"), ("", "left"))
    for name, label in PARTS.items():
        seconds = getattr(step, name)
        if seconds < SHARE_SHOWN * step.seconds:
            continue
        table.add_row(
            label, f"{1e3 * seconds:,.1f}", f"{seconds / step.seconds:.1%}", _note(name, step)
        )
    return table


def summary_lines(found: "Forecast", machines: "Machines") -> list[str]:
    """Give speed, time, goodput and cost, a line each."""
    step = found.step
    rate = step.tokens_per_second
    tokens = found.plan.global_batch_tokens
    lines = [
        f"speed      ~ {rate:,.0f} tokens/s, {rate / machines.num_ranks:,.0f} a rank, "
        f"MFU {found.mfu_fraction:.1%}",
        f"batch      = {tokens:,} tokens a step: {found.plan.micro_batch_samples} samples x "
        f"{found.plan.accumulation_steps} accumulated x {machines.num_ranks} ranks",
        f"chain      = {found.dependent_operations:,} dependent products a micro-batch",
        f"time       ~ {format_seconds(found.seconds)} to the token budget, "
        "without evaluation and start",
        f"goodput    ~ {_goodput(found)}",
    ]
    if found.cost is None:
        lines.append(
            "cost         unknown: the cluster file states no hardware.price, put yours in"
        )
    else:
        amount = found.cost.amount
        shown = f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"
        lines.append(f"cost       ~ {shown} {found.cost.currency}")
    return lines


def best_lines(best: "Candidate | None", step: "StepTime") -> list[str]:
    """Say which layout of the same batch is fastest."""
    if best is None:
        return ["best         no micro-batch, ZeRO stage and checkpointing fits on these ranks"]
    if best.step == step:
        return ["best       ~ as stated: no other layout is more than 5% faster"]
    gain = step.seconds / best.step.seconds
    return [
        f"best       ~ {best.step.tokens_per_second:,.0f} tokens/s ({gain:.2f} times), "
        f"{best.fit.needed_bytes / GIB:.2f} GiB, {best.accumulation_steps} accumulated:",
        f"             {' '.join(best.layout.overrides)}",
    ]


def advice_lines(advice: "Advice", num_ranks: int) -> list[str]:
    """Say what to change so that a run fits."""
    lines = [f"to fit: {override} ({fit.needed_bytes / GIB:.2f} GiB)" for override, fit in
             advice.single]  # fmt: skip
    if lines:
        return lines
    if advice.best is not None:
        needed = advice.best.fit.needed_bytes / GIB
        return [f"to fit: {' '.join(advice.best.layout.overrides)} ({needed:.2f} GiB)"]
    least = f"the smallest layout needs {advice.least_bytes / GIB:.2f} GiB a rank"
    if advice.num_ranks is None:
        return [
            f"fits nowhere: {least} on {num_ranks} ranks, and no number of ranks that divides the "
            "batch suffices; make the model or sequence_tokens smaller, or take devices with more "
            "memory"
        ]
    return [f"to fit: {least} on {num_ranks} ranks; it fits from {advice.num_ranks} ranks on"]


def sweep_page(found: "Sweep", labels: Mapping[str, str]) -> "list[RenderableType]":
    """Lay out weak and strong scaling, and say where a recurrence's chain bites.

    Args:
        found: The sweep.
        labels: Label to what it is.
    """
    parts: list[RenderableType] = [f"{label}: {text}" for label, text in labels.items()]
    for scaling in ("weak", "strong"):
        what = "the batch grows with the hosts" if scaling == "weak" else "one global batch"
        table = _new_table(
            f"{scaling} scaling ({what}), modelled", ("", "left"),
            *((name, "right") for name in (
                "hosts", "ranks", "micro", "tokens/s", "efficiency", "chain", "exposed", "fits"
            )),
        )  # fmt: skip
        for point in found.points:
            if point.scaling == scaling:
                table.add_row(
                    point.label, f"{point.num_nodes:,}", f"{point.num_ranks:,}",
                    f"{point.micro_batch_samples:,}", f"{point.step.tokens_per_second:,.0f}",
                    f"{point.efficiency_fraction:.1%}", f"{point.chain_fraction:.1%}",
                    f"{point.exposed_fraction:.1%}", "yes" if point.fits else "NO",
                )  # fmt: skip
        parts += ["", table]
    parts += ["", *bite_lines(found, list(labels)), *gap_lines(found)]
    return parts


def bite_lines(found: "Sweep", labels: list[str]) -> list[str]:
    """Say from where on latency of recurrent steps bounds strong scaling, for each run."""
    lines = []
    for label in labels:
        points = found.of(label, "strong")
        if not points:
            lines.append(f"{label}: no number of hosts divides its batch, so no chain is shown")
            continue
        if not any(point.step.recurrence for point in points):
            lines.append(f"{label}: no recurrence, no sequential chain beyond its depth")
            continue
        lines += _chain_lines(label, points, found.bites_at(label))
    return lines


def _chain_lines(
    label: str, points: Sequence["SweepPoint"], bite: "SweepPoint | None"
) -> Iterator[str]:
    """Say of strong scaling what its least step is, and from where on that counts."""
    from pipeline.estimate.sweep import CHAIN_BITES_FRACTION

    first, last = points[0], points[-1]
    least = 1e3 * last.least_seconds
    yield f"{label}: no step is shorter than {least:,.1f} ms, the latency of a micro-batch's chain"
    if bite is None:
        share = last.least_seconds / last.step.seconds
        yield f"  that is {share:.0%} of a step at {last.num_ranks:,} ranks"
    else:
        yield f"  it bites from {bite.num_ranks:,} ranks on: it is more than half of a step"
    if first.chain_fraction > CHAIN_BITES_FRACTION:
        yield (
            f"  {first.chain_fraction:.0%} of a step are latency at {first.num_ranks:,} ranks "
            "already: larger micro-batches share it"
        )


def gap_lines(found: "Sweep") -> list[str]:
    """Say which points are left out, and why the first of each line is."""
    told: dict[tuple[str, str], tuple[list[int], str]] = {}
    for gap in found.gaps:
        told.setdefault((gap.label, gap.scaling), ([], gap.reason))[0].append(gap.num_nodes)
    return [
        f"{label}, {scaling}: left out at {', '.join(map(str, counts))} hosts: {reason}"
        for (label, scaling), (counts, reason) in told.items()
    ]


def _goodput(found: "Forecast") -> str:
    goodput = found.goodput
    parts = []
    if goodput.num_failures is not None:
        number = f"{goodput.num_failures:.2g}" if goodput.num_failures > 0.01 else "under 0.01"
        parts.append(f"{number} failures")
    if goodput.interval_seconds is not None:
        parts.append(f"checkpoint every {format_seconds(goodput.interval_seconds)}")
    elif goodput.num_failures is not None:
        parts.append("no checkpoint before the end")
    if goodput.best_interval_seconds is not None:
        parts.append(f"best every {format_seconds(goodput.best_interval_seconds)} (Young)")
    if goodput.note:
        parts.append(goodput.note)
    return f"{goodput.fraction:.2%}: {', '.join(parts)}"


def _note(name: str, step: "StepTime") -> str:
    if name == "recurrence":
        return f"{1e3 * step.recurrence_floor:,.1f} ms of it latency of steps"
    if name == "exposed":
        return f"of {1e3 * step.communication:,.1f} ms in all"
    return ""


def _new_table(title: str, *columns: tuple[str, Any]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False
    )
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")
    return table
