"""From a ladder on disk to `ladder.json`, a report with its pictures, and the study's result."""

from collections.abc import Mapping, Sequence

from pipeline.study import figures
from pipeline.study.analyze import result_of_headline
from pipeline.study.fits import Estimate
from pipeline.study.gain import Gain
from pipeline.study.ladder_figure import draw_compute, draw_lengths
from pipeline.study.ladder_points import collect_points
from pipeline.study.ladder_result import LadderResult, analyze_ladder, as_tree
from pipeline.study.nested import NestedComparison
from pipeline.study.outcome import StudyResult
from pipeline.study.page import Chart, Fact, Page, Section, Table, render_html, render_markdown
from pipeline.study.palette import HUES
from pipeline.study.records import StudyRecords
from pipeline.study.report import FIGURES, REPORT_HTML, REPORT_MARKDOWN
from pipeline.study.wording import say_count, say_number
from pipeline.tracking.atomic import write_text_atomic
from pipeline.tracking.store import write_json_atomic

LADDER_FILE = "ladder.json"
AXIS_NAMES = {
    "parameters": "parameters, at equal tokens",
    "tokens": "tokens, at equal parameters",
    "flops": "training FLOPs",
    "device_seconds": "device seconds",
}
HOW_TO_READ = (
    "L(N, D) = E + A / N^alpha + B / D^beta, N all parameters and D training tokens, fitted to the "
    "logarithms of the losses. A range is a 95% interval over resampled trunks: the "
    "branches of one trunk share its noise. M0 holds one law for both families; M1 lets A and B "
    "differ, M2 also the exponents, M3 also the floor E; the lowest BIC is taken."
)


def report_ladder(records: StudyRecords, *, stopped: bool) -> StudyResult:
    """Analyze a ladder and write its report.

    Args:
        records: The study as it stands on disk.
        stopped: Whether it ended on request before its last run.

    Returns:
        The result of the study; its headline holds exponents and gains.
    """
    labels = list(records.plan.families)
    names = {label: records.plan.display_name(label) for label in labels}
    found = analyze_ladder(collect_points(records), labels, records.reference)
    headline = _say_findings(found, names, records.reference)
    result = result_of_headline(records, headline, stopped=stopped)
    directory = records.plan.directory
    drawn = _draw(found, records)
    (directory / FIGURES).mkdir(exist_ok=True)
    for chart, figure in drawn:
        write_text_atomic(directory / FIGURES / f"{chart.name}.json", figures.to_json(figure))
    page = _build_page(result, found, [chart for chart, _ in drawn])
    write_json_atomic(directory / LADDER_FILE, as_tree(found))
    write_text_atomic(directory / REPORT_MARKDOWN, render_markdown(page))
    write_text_atomic(directory / REPORT_HTML, render_html(page, figures.library_script()))
    return result


def _say_findings(found: LadderResult, names: Mapping[str, str], reference: str) -> list[str]:
    sentences = []
    for comparison in found.comparisons:
        own = comparison.differences["compute_exponent"].estimate
        if own.low is None:
            verdict = "one trunk a size gives no interval, so this decides nothing"
        elif own.excludes_zero:
            verdict = "the exponents differ"
        else:
            verdict = "no evidence of different exponents in this range"
        sentences.append(
            f"Exponents. Along the compute frontier the exponent of the reducible loss is larger "
            f"by {_say_signed(own)} for the {names[comparison.family]} than for the "
            f"{names[comparison.reference]}: {verdict}. BIC takes {comparison.chosen}."
        )
    for label, axes in found.gains.items():
        parts = [
            f"{_say_ratio(gains[0])} in {AXIS_NAMES[axis]}" for axis, gains in axes.items() if gains
        ]
        if parts:
            loss = next(gains[0].loss for gains in axes.values() if gains)
            sentences.append(
                f"Cost. For the lowest loss that both reach, {loss:.3f} nats/token, the "
                f"{names[label]} needs, times what the {names[reference]} needs: "
                f"{'; '.join(parts)}."
            )
    return sentences + [f"Missing. {text}" for text in found.obstacles]


def _say_signed(estimate: Estimate) -> str:
    text = say_number(estimate.value, 4)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({say_number(estimate.low, 4)} to {say_number(estimate.high, 4)})"


def _say_ratio(gain: Gain) -> str:
    ratio = gain.ratio
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}"
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _draw(found: LadderResult, records: StudyRecords) -> list[tuple[Chart, figures.Figure]]:
    names = {label: records.plan.display_name(label) for label in records.plan.families}
    hues = {label: HUES[i % len(HUES)] for i, label in enumerate(names)}
    if not found.points:
        return []
    drawn = {
        "ladder-tokens": (
            "Loss over training tokens",
            "Markers: finished runs, each cooled down. Lines: the fitted law of the family at each "
            "size.",
            draw_lengths(found.points, found.laws, names, hues),
        ),
        "ladder-flops": (
            "Loss over training FLOPs",
            "Markers: finished runs. Lines join the means of one size.",
            draw_compute(found.points, names, hues),
        ),
    }
    return [
        (
            Chart(name=name, title=title, caption=caption, div=figures.to_html(figure, name)),
            figure,
        )
        for name, (title, caption, figure) in drawn.items()
    ]


def _build_page(result: StudyResult, found: LadderResult, charts: Sequence[Chart]) -> Page:
    sections = [
        Section(title="Scaling", charts=charts, tables=[_tabulate_laws(found)]),
        Section(
            title="How the families differ",
            paragraphs=[HOW_TO_READ],
            tables=[_tabulate_models(c) for c in found.comparisons] + [_tabulate_gains(found)],
        ),
        Section(title="Runs", tables=[_tabulate_points(found)]),
    ]
    if result.missing:
        points = [f"Run {name} has no result: {why}" for name, why in result.missing.items()]
        sections.insert(0, Section(title="What is missing or failed", points=points))
    return Page(
        title=f"Study {result.study}",
        subtitle="The families at several sizes and lengths of training",
        status=result.status,
        facts=[
            Fact(name="finished runs", value=str(len(found.points)), unit=""),
            Fact(name="trunks", value=str(len({p.trunk for p in found.points})), unit=""),
        ],
        findings=result.headline or ["No finding: no run is finished."],
        sections=sections,
    )


def _tabulate_laws(found: LadderResult) -> Table:
    names = list(found.laws[0].constants) if found.laws else []
    rows = [(law.label, *(_say_range(law.constants[name]) for name in names)) for law in found.laws]
    return Table(columns=("family", *names), rows=rows, note="95% intervals, trunks resampled")


def _say_range(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})"


def _tabulate_models(comparison: NestedComparison) -> Table:
    rows = [
        (
            name, "yes" if name == comparison.chosen else "", str(model.num_parameters),
            f"{model.bic:.1f}", f"{model.objective:.3e}",
            "–" if model.held_out_error is None else f"{model.held_out_error:.4f}",
        )
        for name, model in comparison.models.items()
    ]  # fmt: skip
    return Table(
        columns=(
            f"model, {comparison.family} and {comparison.reference}", "taken", "parameters", "BIC",
            "Huber sum", "error at the largest size (nats/token)",
        ),
        rows=rows,
        num_text_columns=2,
    )  # fmt: skip


def _tabulate_gains(found: LadderResult) -> Table:
    rows = [
        (label, AXIS_NAMES[axis], f"{gain.loss:.4f}", _say_ratio(gain))
        for label, axes in found.gains.items()
        for axis, gains in axes.items()
        for gain in gains
    ]
    return Table(
        columns=("family", "budget", "loss (nats/token)", "times the reference's"),
        rows=rows,
        num_text_columns=2,
        note="above 1 the family needs more; nothing is read outside the measured sizes",
    )


def _tabulate_points(found: LadderResult) -> Table:
    rows = [
        (
            p.run, p.trunk, say_count(p.num_parameters), say_count(p.tokens), f"{p.loss:.4f}",
            "–" if p.flops is None else f"{p.flops:.3e}",
            "–" if p.device_seconds is None else f"{p.device_seconds:,.1f}",
        )
        for p in found.points
    ]  # fmt: skip
    return Table(
        columns=(
            "run", "trunk", "parameters", "tokens", "validation loss (nats/token)", "FLOPs",
            "device seconds",
        ),
        rows=rows,
        num_text_columns=2,
    )  # fmt: skip
