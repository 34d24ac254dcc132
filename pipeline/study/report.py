"""From a result and its records to `report.html`, `report.md` and `figures/`."""

from pathlib import Path

from pipeline.study.figures import library_script
from pipeline.study.outcome import StudyResult
from pipeline.study.page import render_html, render_markdown
from pipeline.study.records import StudyRecords
from pipeline.study.sections import ReportBuilder
from pipeline.tracking.atomic import write_text_atomic

REPORT_HTML = "report.html"
REPORT_MARKDOWN = "report.md"
FIGURES = "figures"


def write_report(result: StudyResult, records: StudyRecords) -> Path:
    """Write the report of a study into its directory.

    Args:
        result: What was found.
        records: What it was found in.

    Returns:
        The HTML page: one file that needs no network.
    """
    builder = ReportBuilder(result, records)
    page = builder.build()
    directory = records.plan.directory
    (directory / FIGURES).mkdir(exist_ok=True)
    for name, text in builder.figure_json.items():
        write_text_atomic(directory / FIGURES / f"{name}.json", text)
    write_text_atomic(directory / REPORT_MARKDOWN, render_markdown(page))
    path = directory / REPORT_HTML
    write_text_atomic(path, render_html(page, library_script()))
    return path
