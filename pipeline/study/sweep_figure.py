"""From a sweep over hosts to a page with two pictures: throughput, and where a chain bites."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.estimate.sweep import CHAIN_BITES_FRACTION, Sweep, SweepPoint
from pipeline.study.figures import CONFIG, Figure
from pipeline.study.palette import FONT, GRID, HUES, INK, MUTED, Hue
from pipeline.tracking.atomic import write_text_atomic

LEFT, RIGHT = (0.0, 0.45), (0.55, 1.0)
"""Shares of the width that the two pictures take."""


def write_sweep(found: Sweep, path: Path) -> None:
    """Write the page of a sweep; it holds the drawing library and works offline.

    Args:
        found: The sweep.
        path: HTML file.
    """
    page = draw_sweep(found).to_html(include_plotlyjs=True, config=CONFIG)
    write_text_atomic(path, str(page))


def draw_sweep(found: Sweep) -> Figure:
    """Draw tokens per second over ranks, and the share of a step in one micro-batch's chain.

    Lines are strong scaling, dashes weak, a dotted line what strong scaling would be without loss.
    """
    figure = Figure()
    labels = list(dict.fromkeys(point.label for point in found.points))
    for label, hue in zip(labels, HUES, strict=False):
        _add_rates(figure, found.of(label, "strong"), hue, "solid")
        _add_rates(figure, found.of(label, "weak"), hue, "dash")
        _add_ideal(figure, found.of(label, "strong"), hue)
        _add_chain(figure, found.of(label, "strong"), hue)
    ranks = sorted({point.num_ranks for point in found.points})
    ticks = {"tickvals": ranks, "ticktext": [f"{count:,}" for count in ranks]}
    axis = {"type": "log", "title": "ranks", "gridcolor": GRID, **ticks}
    figure.update_layout(
        template="plotly_white", height=460, font={"family": FONT, "size": 13, "color": INK},
        title="Modelled scaling over hosts", margin={"t": 96},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.04, "x": 0},
        xaxis={**axis, "domain": LEFT}, xaxis2={**axis, "domain": RIGHT, "anchor": "y2"},
        yaxis={"type": "log", "title": "tokens/s, all ranks", "gridcolor": GRID},
        yaxis2={
            "title": "share of the step in one chain", "tickformat": ".0%",
            "range": [0, 1], "anchor": "x2", "gridcolor": GRID,
        },
    )  # fmt: skip
    figure.add_shape(
        type="line", x0=0, x1=1, xref="x2 domain", y0=CHAIN_BITES_FRACTION,
        y1=CHAIN_BITES_FRACTION, yref="y2", line={"color": MUTED, "dash": "dash", "width": 1.2},
    )  # fmt: skip
    figure.add_annotation(
        x=0, xref="x2 domain", y=CHAIN_BITES_FRACTION, yref="y2", text="the chain bites",
        showarrow=False, xanchor="left", yanchor="bottom", font={"color": MUTED, "size": 12},
    )  # fmt: skip
    return figure


def _add_rates(figure: Figure, points: Sequence[SweepPoint], hue: Hue, dash: str) -> None:
    if not points:
        return
    name = f"{points[0].label}, {points[0].scaling}"
    figure.add_scatter(
        x=[point.num_ranks for point in points],
        y=[point.step.tokens_per_second for point in points], name=name, mode="lines+markers",
        line={"color": hue.base, "width": 2.5, "dash": dash},
        marker={"size": 7, "symbol": hue.symbol},
        hovertemplate="%{y:,.0f} tokens/s on %{x} ranks<extra>" + name + "</extra>",
    )  # fmt: skip


def _add_ideal(figure: Figure, points: Sequence[SweepPoint], hue: Hue) -> None:
    if not points:
        return
    first = points[0]
    per_rank = first.step.tokens_per_second / first.num_ranks
    figure.add_scatter(
        x=[point.num_ranks for point in points],
        y=[per_rank * point.num_ranks for point in points], mode="lines", showlegend=False,
        line={"color": hue.light, "width": 1.2, "dash": "dot"}, hoverinfo="skip",
    )  # fmt: skip


def _add_chain(figure: Figure, points: Sequence[SweepPoint], hue: Hue) -> None:
    figure.add_scatter(
        x=[point.num_ranks for point in points],
        y=[point.least_seconds / point.step.seconds for point in points],
        xaxis="x2", yaxis="y2", mode="lines+markers", showlegend=False,
        line={"color": hue.base, "width": 2.5}, marker={"size": 7, "symbol": hue.symbol},
        hovertemplate="%{y:.1%} on %{x} ranks<extra></extra>",
    )  # fmt: skip
