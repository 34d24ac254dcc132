"""From a search on disk to `search.json`, a report with its tables, and the study's result."""

from dataclasses import asdict

from pipeline.config.study import SearchConfig
from pipeline.study.analyze import result_of_headline
from pipeline.study.outcome import StudyResult
from pipeline.study.page import Fact, Page, Section, Table, render_html, render_markdown
from pipeline.study.records import StudyRecords
from pipeline.study.report import REPORT_HTML, REPORT_MARKDOWN
from pipeline.study.search import Coefficient, ModelSearch, SearchResult, analyze_search
from pipeline.study.wording import say_count
from pipeline.tracking.atomic import write_text_atomic
from pipeline.tracking.store import write_json_atomic

SEARCH_FILE = "search.json"

NAMES = {
    "learning_rate": "learning rate",
    "batch_tokens": "batch",
    "warmup_tokens": "warm-up",
    "beta2": "beta2",
}
"""Hyperparameters as people name them."""

NO_RULE = (
    "A coefficient holds for the sizes searched; the rule's exponents are the published ones and "
    "are not tested here. The interval resamples the trials and knows nothing of other seeds."
)


def report_search(records: StudyRecords, search: SearchConfig, *, stopped: bool) -> StudyResult:
    """Analyze a search and write its tables.

    Args:
        records: The study as it stands on disk.
        search: What it draws.
        stopped: Whether it ended on request before its last trial.

    Returns:
        The result of the study; its headline holds coefficients and flags.
    """
    found = analyze_search(records, search)
    result = result_of_headline(records, _say_findings(found), stopped=stopped)
    directory = records.plan.directory
    page = _build_page(result, found)
    write_json_atomic(directory / SEARCH_FILE, asdict(found))
    write_text_atomic(directory / REPORT_MARKDOWN, render_markdown(page))
    write_text_atomic(directory / REPORT_HTML, render_html(page, library_script=""))
    return result


def _say_findings(found: SearchResult) -> list[str]:
    if not found.models:
        return []
    sentences = [
        f"Trials. Each of {len(found.models)} models finished the same {found.num_trials} trials; "
        f"coefficients are over the best {found.num_best} of them."
    ]
    for family in dict.fromkeys(c.family for c in found.coefficients):
        own = [c for c in found.coefficients if c.family == family]
        sentences.append(f"{family}. {'; '.join(_say_coefficient(c) for c in own)}.")
    edges = [
        f"{NAMES[optimum.parameter]} of {model.label} ({optimum.best:.3g})"
        for model in found.models
        for optimum in model.optima
        if optimum.is_at_edge
    ]
    if edges:
        sentences.append(
            f"Edges. Best values in the outer tenth of their range, or beyond which no trial went, "
            f"so that the optimum may lie outside: {', '.join(edges)}."
        )
    return sentences


def _say_coefficient(found: Coefficient) -> str:
    unit = "" if found.parameter == "beta2" else " times the published"
    return f"{NAMES[found.parameter]} {found.value:.3g}{unit} ({found.low:.3g} to {found.high:.3g})"


def _build_page(result: StudyResult, found: SearchResult) -> Page:
    return Page(
        title=f"Search {result.study}",
        subtitle="The same random trials of hyperparameters for every model",
        status=result.status,
        facts=[Fact(name="trials of each model", value=str(found.num_trials), unit="")],
        findings=result.headline or ["No finding: no trial was finished by every model."],
        sections=[
            Section(
                title="Coefficients", paragraphs=[NO_RULE], tables=[_tabulate_coefficients(found)]
            ),
            Section(title="Optima", tables=[_tabulate_optima(found)]),
            Section(title="Trials", tables=[_tabulate_trials(model) for model in found.models]),
        ],
    )


def _tabulate_coefficients(found: SearchResult) -> Table:
    rows = [
        (
            c.family, NAMES[c.parameter], f"{c.value:.3g}", f"{c.low:.3g} to {c.high:.3g}",
            f"{c.ratio:.2f}", f"{c.ratio_low:.2f} to {c.ratio_high:.2f}",
        )
        for c in found.coefficients
    ]  # fmt: skip
    return Table(
        columns=("family", "coefficient", "value", "95%", "over the first family", "95%"),
        rows=rows,
        num_text_columns=2,
        note="multiples of the published rule; beta2 as it is, its ratio that of 1 - beta2",
    )


def _tabulate_optima(found: SearchResult) -> Table:
    rows = [
        (
            model.label, NAMES[o.parameter], "at the edge" if o.is_at_edge else "interior",
            say_count(model.num_parameters), f"{o.best:.3g}", f"{o.centre:.3g}",
            f"{o.low:.3g} to {o.high:.3g}",
        )
        for model in found.models
        for o in model.optima
    ]  # fmt: skip
    return Table(
        columns=(
            "model", "hyperparameter", "best trial is", "non-embedding parameters", "best trial",
            "centre of the best", "range of the best",
        ),
        rows=rows,
        num_text_columns=3,
    )  # fmt: skip


def _tabulate_trials(model: ModelSearch) -> Table:
    ranked = sorted(model.trials, key=lambda trial: trial.loss)
    rows = [
        (
            f"{model.label} {trial.index}", f"{trial.loss:.4f}", f"{trial.learning_rate:.3g}",
            f"{trial.batch_tokens:.3g}", f"{trial.warmup_tokens:.3g}", f"{trial.beta2:.4f}",
        )
        for trial in ranked
    ]  # fmt: skip
    return Table(
        columns=("trial", "validation loss (nats/token)", *NAMES.values()),
        rows=rows,
        note="from best to worst",
    )
