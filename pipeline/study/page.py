"""From sections of words, tables and charts to one HTML page and one Markdown file."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.study.palette import FONT, GRID, INK, MUTED


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under column titles; columns after `num_text_columns` are numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text_columns: int = 1
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart and what it shows."""

    name: str
    title: str
    caption: str
    div: str
    """HTML of the chart; the page holds the drawing library."""
    is_wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of a report."""

    title: str
    paragraphs: Sequence[str] = field(default_factory=tuple)
    points: Sequence[str] = field(default_factory=tuple)
    charts: Sequence[Chart] = field(default_factory=tuple)
    tables: Sequence[Table] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A number that stands on top of a report."""

    name: str
    value: str
    unit: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    status: str
    facts: Sequence[Fact]
    """The few numbers that stand on top."""
    findings: Sequence[str]
    """Sentences that begin with a topic and a full stop."""
    sections: Sequence[Section]


def render_html(page: Page, library_script: str) -> str:
    """Give a page that opens offline: style, script and data all stand inside."""
    facts = "".join(
        f"<div class='fact'><span>{_text(fact.name)}</span>"
        f"<strong>{_text(fact.value)}</strong> <em>{_text(fact.unit)}</em></div>"
        for fact in page.facts
    )
    findings = "".join(f"<li>{_lead(text)}</li>" for text in page.findings)
    links = "".join(f"<a href='#{_anchor(s.title)}'>{_text(s.title)}</a>" for s in page.sections)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>"
        f"<title>{_text(page.title)}</title><style>{STYLE}</style>"
        f"<script>{library_script}</script></head><body><main>"
        f"<header><p class='badge {_text(page.status)}'>{_text(page.status)}</p>"
        f"<h1>{_text(page.title)}</h1><p class='subtitle'>{_text(page.subtitle)}</p>"
        f"<div class='facts'>{facts}</div></header>"
        f"<section class='findings'><h2>What was found</h2><ul>{findings}</ul></section>"
        f"<nav>{links}</nav>"
        f"{''.join(_section_html(section) for section in page.sections)}"
        "</main></body></html>\n"
    )


def render_markdown(page: Page) -> str:
    """Give the words and tables of a page; charts stand as their captions."""
    lines = [f"# {page.title}", "", page.subtitle, "", f"Status: **{page.status}**", ""]
    lines += [f"- {fact.name}: {fact.value} {fact.unit}".rstrip() for fact in page.facts]
    lines += ["", "## What was found", "", *(f"- {text}" for text in page.findings)]
    for section in page.sections:
        lines += ["", f"## {section.title}"]
        for paragraph in section.paragraphs:
            lines += ["", paragraph]
        if section.points:
            lines += ["", *(f"- {point}" for point in section.points)]
        for chart in section.charts:
            lines += ["", f"Chart (in report.html), {chart.title}: {chart.caption}"]
        for table in section.tables:
            lines += ["", *_table_lines(table)]
    return "\n".join(lines) + "\n"


def _section_html(section: Section) -> str:
    paragraphs = "".join(f"<p>{_text(text)}</p>" for text in section.paragraphs)
    points = "".join(f"<li>{_text(text)}</li>" for text in section.points)
    charts = "".join(_chart_html(chart) for chart in section.charts)
    return (
        f"<section id='{_anchor(section.title)}'><h2>{_text(section.title)}</h2>{paragraphs}"
        + (f"<ul>{points}</ul>" if points else "")
        + (f"<div class='charts'>{charts}</div>" if charts else "")
        + "".join(_table_html(table) for table in section.tables)
        + "</section>"
    )


def _chart_html(chart: Chart) -> str:
    kind = "wide" if chart.is_wide else ""
    return (
        f"<figure class='{kind}'><h3>{_text(chart.title)}</h3>{chart.div}"
        f"<figcaption>{_text(chart.caption)}</figcaption></figure>"
    )


def _table_html(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        parts = [
            f"<{tag}{_align(index, table)}>{_text(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    note = f"<p class='note'>{_text(table.note)}</p>" if table.note else ""
    return (
        f"<div class='table'><table><thead>{row(table.columns, 'th')}</thead><tbody>"
        f"{''.join(row(cells, 'td') for cells in table.rows)}</tbody></table></div>{note}"
    )


def _align(index: int, table: Table) -> str:
    return "" if index < table.num_text_columns else " class='number'"


def _table_lines(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    marks = ["---" if i < table.num_text_columns else "---:" for i in range(len(table.columns))]
    rows = [line(table.columns), line(marks), *(line(cells) for cells in table.rows)]
    return [*rows, "", table.note] if table.note else rows


def _text(text: str) -> str:
    return html.escape(text)


def _lead(text: str) -> str:
    topic, _, rest = text.partition(". ")
    return f"<strong>{_text(topic)}.</strong> {_text(rest)}" if rest else _text(text)


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
"""The browser itself refuses any request that the page might make."""

STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #f4f6f8; color: {INK}; font: 16px/1.55 {FONT}; }}
main {{ max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }}
header {{ position: relative; }}
h1 {{ font-size: 34px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }}
h2 {{ font-size: 22px; margin: 0 0 10px; letter-spacing: -0.005em; }}
h3 {{ font-size: 16px; margin: 0 0 4px; }}
p {{ margin: 0 0 12px; max-width: 88ch; }}
ul {{ margin: 0 0 12px; padding-left: 22px; }}
li {{ margin: 0 0 8px; max-width: 112ch; }}
.subtitle {{ color: {MUTED}; font-size: 17px; margin-bottom: 20px; }}
.badge {{ position: absolute; right: 0; top: 6px; margin: 0; padding: 3px 14px;
  border-radius: 999px; font-size: 14px; font-weight: 600; background: #fbe9e7; color: #8c1d18; }}
.badge.complete {{ background: #e3f1ea; color: #14532d; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px;
  margin-bottom: 20px; }}
.fact, section {{ background: #fff; border: 1px solid {GRID}; border-radius: 12px; }}
.fact {{ padding: 12px 16px; }}
.fact span {{ display: block; color: {MUTED}; font-size: 13px; white-space: nowrap; }}
.fact strong {{ font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }}
.fact em {{ color: {MUTED}; font-size: 13px; font-style: normal; }}
section {{ padding: 24px 28px; margin-bottom: 20px; scroll-margin-top: 12px; }}
.findings {{ border-left: 5px solid #2f6f4f; }}
.findings ul {{ list-style: none; padding: 0; margin: 0; }}
.findings li:last-child {{ margin: 0; }}
nav {{ display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0 4px 20px; font-size: 14px; }}
nav a {{ color: {MUTED}; text-decoration: none; }}
nav a:hover {{ color: {INK}; text-decoration: underline; }}
.charts {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 28px 32px;
  margin-top: 16px; }}
figure {{ margin: 0; min-width: 0; }}
figure.wide {{ grid-column: 1 / -1; }}
figcaption, .note {{ color: {MUTED}; font-size: 13.5px; line-height: 1.45; margin-top: 4px;
  max-width: none; }}
.table {{ overflow-x: auto; margin-top: 16px; }}
table {{ border-collapse: collapse; font-size: 13px; width: 100%;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 6px 7px; border-bottom: 1px solid {GRID};
  vertical-align: top; }}
th {{ color: {MUTED}; font-weight: 600; vertical-align: bottom; border-bottom: 2px solid {GRID}; }}
td.number, td:first-child {{ white-space: nowrap; }}
th.number, td.number {{ text-align: right; }}
@media (max-width: 860px) {{ .charts {{ grid-template-columns: minmax(0, 1fr); }}
  .badge {{ position: static; display: inline-block; margin-bottom: 8px; }} }}
@media print {{ body {{ background: #fff; }} section {{ break-inside: avoid; }}
  nav {{ display: none; }} }}
"""
