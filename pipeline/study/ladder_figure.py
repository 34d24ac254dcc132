"""From the points and laws of a ladder to pictures: loss over tokens, and over training FLOPs."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.study.figures import Figure
from pipeline.study.ladder_result import FamilyLaw
from pipeline.study.palette import FONT, GRID, INK, MUTED, Hue
from pipeline.study.scaling import ScalingPoint
from pipeline.study.wording import say_count

NUM_CURVE_POINTS = 40


def draw_lengths(
    points: Sequence[ScalingPoint],
    laws: Sequence[FamilyLaw],
    names: Mapping[str, str],
    hues: Mapping[str, Hue],
) -> Figure:
    """Draw measured losses over tokens, a line of the fitted law for each size."""
    figure = Figure()
    by_label = {law.label: law for law in laws}
    for label in names:
        own = [p for p in points if p.family == label]
        _add_points(figure, own, [p.tokens for p in own], names[label], hues[label])
        for size in sorted({p.num_parameters for p in own}):
            lengths = [p.tokens for p in own if p.num_parameters == size]
            if label not in by_label or len(set(lengths)) < 2:
                continue
            x = np.geomspace(min(lengths), max(lengths), NUM_CURVE_POINTS)
            y = [by_label[label].law.predict(size, float(tokens)) for tokens in x]
            figure.add_scatter(
                x=x, y=y, mode="lines", showlegend=False,
                line={"color": hues[label].base, "width": 1.6},
                hovertemplate=f"fitted law, {say_count(size)} parameters<extra></extra>",
            )  # fmt: skip
    return _finish(figure, "training tokens")


def draw_compute(
    points: Sequence[ScalingPoint], names: Mapping[str, str], hues: Mapping[str, Hue]
) -> Figure:
    """Draw measured losses over training FLOPs, the points of one size joined."""
    figure = Figure()
    for label in names:
        own = sorted((p for p in points if p.family == label), key=lambda p: p.flops or 0.0)
        _add_points(figure, own, [p.flops for p in own], names[label], hues[label])
        for size in sorted({p.num_parameters for p in own}):
            rung = [p for p in own if p.num_parameters == size]
            budgets = sorted({p.flops for p in rung if p.flops is not None})
            means = [float(np.mean([p.loss for p in rung if p.flops == b])) for b in budgets]
            figure.add_scatter(
                x=budgets, y=means, mode="lines", showlegend=False, hoverinfo="skip",
                line={"color": hues[label].light, "width": 1.6},
            )  # fmt: skip
    return _finish(figure, "training FLOPs")


def _add_points(
    figure: Figure,
    points: Sequence[ScalingPoint],
    x: Sequence[float | None],
    name: str,
    hue: Hue,
) -> None:
    figure.add_scatter(
        x=list(x), y=[p.loss for p in points], name=name, mode="markers",
        marker={"size": 8, "symbol": hue.symbol, "color": hue.base},
        customdata=[[say_count(p.num_parameters), p.run] for p in points],
        hovertemplate="%{y:.3f} nats/token, %{customdata[0]} parameters<extra>%{customdata[1]}"
        "</extra>",
    )  # fmt: skip


def _finish(figure: Figure, x_title: str) -> Figure:
    figure.update_layout(
        template="plotly_white", height=420, font={"family": FONT, "size": 13, "color": INK},
        margin={"l": 64, "r": 20, "t": 28, "b": 56}, hoverlabel={"font": {"family": FONT}},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.04, "xanchor": "left", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    axis = {"type": "log", "gridcolor": GRID, "linecolor": MUTED, "automargin": True}
    figure.update_xaxes(title_text=x_title, **axis)
    figure.update_yaxes(title_text="validation loss (nats/token)", zeroline=False, **axis)
    return figure
