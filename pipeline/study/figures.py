"""From series to charts; the only file that knows the plotting library."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import plotly.io
import plotly.offline
from plotly.subplots import make_subplots

from pipeline.study.fits import fit_power_law
from pipeline.study.palette import FONT, GRID, INK, MUTED, Hue
from pipeline.study.series import LossCurve, PositionBin, StateBytes, StepTimes

Figure = go.Figure

FORMULA_MARKS = {
    "total": ("closed form with master weights", INK, "solid"),
    "published": ("published formula", INK, "dot"),
}
"""Closed form to name, colour and dash of its marks."""

CONFIG = {"displayModeBar": False, "responsive": True}


@dataclass(frozen=True, kw_only=True)
class FamilyCurves:
    """What the charts draw of one family."""

    name: str
    hue: Hue
    training: list[LossCurve]
    validation: list[LossCurve]
    positions: list[PositionBin]
    times: list[StepTimes]
    """In the order of the sequence lengths."""
    slope_text: str
    """Exponent of step time with its interval; empty where there is none."""


def draw_loss(families: Sequence[FamilyCurves], axis: str, floor_nats: float | None) -> go.Figure:
    """Draw training and validation loss over `tokens` or `seconds`."""
    figure = go.Figure()
    for family in families:
        for index, curve in enumerate(family.training):
            figure.add_scatter(
                x=getattr(curve, axis), y=curve.loss, name=f"{family.name}, training",
                mode="lines", line={"color": family.hue.base, "width": 1.2}, opacity=0.55,
                showlegend=index == 0, legendgroup=f"{family.name}, training",
                hovertemplate="%{y:.3f} nats/token<extra>" + curve.run + ", training</extra>",
            )  # fmt: skip
        for index, curve in enumerate(family.validation):
            figure.add_scatter(
                x=getattr(curve, axis), y=curve.loss, name=f"{family.name}, validation",
                mode="lines+markers", line={"color": family.hue.base, "width": 2.5},
                marker={"size": 7, "symbol": family.hue.symbol}, showlegend=index == 0,
                legendgroup=f"{family.name}, validation",
                hovertemplate="%{y:.3f} nats/token<extra>" + curve.run + ", validation</extra>",
            )  # fmt: skip
    if floor_nats is not None:
        _add_reference(figure, floor_nats, f"unigram entropy {floor_nats:.2f}")
    label = "training tokens" if axis == "tokens" else "seconds since the start of the run"
    return _finish(figure, x_title=label, y_title="loss (nats/token)")


def draw_positions(families: Sequence[FamilyCurves]) -> go.Figure:
    """Draw validation loss over the position in the sample, with 95% intervals."""
    figure = go.Figure()
    for family in families:
        bins = family.positions
        figure.add_scatter(
            x=[b.centre for b in bins], y=[b.loss.value for b in bins], name=family.name,
            mode="lines+markers", line={"color": family.hue.base, "width": 2.5},
            marker={"size": 7, "symbol": family.hue.symbol},
            error_y=_error_bars([b.loss.half_width for b in bins], family.hue.base),
            customdata=[_say_positions(b) for b in bins],
            hovertemplate="%{y:.3f} nats/token, %{customdata}<extra>" + family.name + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(type="log", dtick=math.log10(2))
    return _finish(figure, x_title="position in the sample (tokens)", y_title="loss (nats/token)")


def draw_position_gap(name: str, bins: Sequence[PositionBin], hue: Hue) -> go.Figure:
    """Draw the difference of two families' losses over the position, with 95% intervals."""
    figure = go.Figure()
    figure.add_scatter(
        x=[b.centre for b in bins], y=[b.loss.value for b in bins], name=name,
        mode="lines+markers", line={"color": hue.base, "width": 2.5},
        marker={"size": 7, "symbol": hue.symbol}, showlegend=False,
        error_y=_error_bars([b.loss.half_width for b in bins], hue.base),
        customdata=[_say_positions(b) for b in bins],
        hovertemplate="%{y:+.3f} nats/token, %{customdata}<extra></extra>",
    )  # fmt: skip
    _add_reference(figure, 0.0, "")
    figure.update_xaxes(type="log", dtick=math.log10(2))
    return _finish(figure, x_title="position in the sample (tokens)", y_title="nats/token")


def draw_step_time(families: Sequence[FamilyCurves]) -> go.Figure:
    """Draw the step time over the sequence length on log axes, with the fitted power law."""
    figure = go.Figure()
    for family in families:
        if not family.times:
            continue
        lengths = [float(t.sequence_tokens) for t in family.times]
        quartiles = [t.quartiles for t in family.times]
        medians = [1e3 * q.median for q in quartiles]
        figure.add_scatter(
            x=lengths, y=medians, name=family.name, mode="markers",
            marker={"size": 9, "symbol": family.hue.symbol, "color": family.hue.base},
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.5, "width": 4,
                "array": [1e3 * (q.high - q.median) for q in quartiles],
                "arrayminus": [1e3 * (q.median - q.low) for q in quartiles],
            },
            hovertemplate="%{y:.1f} ms at %{x} tokens<extra>" + family.name + "</extra>",
        )  # fmt: skip
        if len(lengths) > 1:
            fit = fit_power_law(lengths, medians)
            figure.add_scatter(
                x=lengths, mode="lines", line={"color": family.hue.base, "width": 2},
                y=[math.exp(fit.intercept) * x**fit.slope.value for x in lengths],
                name=f"exponent {family.slope_text}", hoverinfo="skip",
            )  # fmt: skip
    _log_lengths(figure, families)
    figure.update_yaxes(type="log", tickvals=_log_ticks(families), tickformat="~g")
    return _finish(figure, x_title="sequence length (tokens)", y_title="milliseconds per step")


def draw_throughput(families: Sequence[FamilyCurves]) -> go.Figure:
    """Draw tokens per second over the sequence length."""
    figure = go.Figure()
    for family in families:
        figure.add_scatter(
            x=[t.sequence_tokens for t in family.times],
            y=[t.tokens_per_second for t in family.times], name=family.name,
            mode="lines+markers", line={"color": family.hue.base, "width": 2.5},
            marker={"size": 8, "symbol": family.hue.symbol},
            hovertemplate="%{y:,.0f} tokens/s at %{x} tokens<extra>" + family.name + "</extra>",
        )  # fmt: skip
    _log_lengths(figure, families)
    figure.update_yaxes(rangemode="tozero", tickformat=",")
    return _finish(figure, x_title="sequence length (tokens)", y_title="tokens/s, all ranks")


def draw_state(
    states: Sequence[StateBytes], names: Mapping[str, str], hues: Mapping[str, Hue]
) -> go.Figure:
    """Draw model state by ZeRO stage, a panel for each world size, with the closed form on top."""
    world_sizes = sorted({state.world_size for state in states})
    titles = [f"<b>{size} rank{'s' if size > 1 else ''}</b>" for size in world_sizes]
    figure = make_subplots(
        rows=1, cols=len(world_sizes), shared_yaxes=True, subplot_titles=titles,
        horizontal_spacing=0.04,
    )  # fmt: skip
    width = 0.8 / len(names)
    for column, world_size in enumerate(world_sizes, start=1):
        for index, (label, name) in enumerate(names.items()):
            own = [s for s in states if (s.label, s.world_size) == (label, world_size)]
            shift = (index - (len(names) - 1) / 2) * width
            slots = [state.zero_stage + shift for state in own]
            _add_state_bars(figure, own, name, hues[label], (slots, 0.9 * width, column))
            _add_formula_marks(figure, own, (slots, 0.9 * width, column), index == 0)
    figure.update_layout(barmode="stack")
    _finish(figure, x_title="", y_title="")
    stages = sorted({state.zero_stage for state in states})
    figure.update_xaxes(tickvals=stages, ticktext=[f"ZeRO stage {n}" for n in stages])
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="MiB a rank", row=1, col=1)
    figure.update_layout(height=460, legend={"y": -0.12, "yanchor": "top", "traceorder": "normal"})
    return figure


def draw_bars(values: Mapping[str, float], hues: Mapping[str, Hue], unit: str) -> go.Figure:
    """Draw one horizontal bar for each named value."""
    figure = go.Figure()
    for name, value in values.items():
        figure.add_bar(
            x=[value], y=[name], orientation="h", marker={"color": hues[name].base},
            showlegend=False, text=[f"{value:,.0f} {unit}"], textposition="auto",
            hovertemplate="%{x:,.1f} " + unit + "<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(rangemode="tozero", tickformat=",")
    figure.update_yaxes(autorange="reversed")
    _finish(figure, x_title=unit, y_title="")
    figure.update_layout(height=90 + 48 * len(values), bargap=0.35)
    return figure


def draw_shares(seconds: Mapping[str, float], colours: Mapping[str, str]) -> go.Figure:
    """Draw where the time went as one stacked bar."""
    figure = go.Figure()
    total = sum(seconds.values())
    for name, value in seconds.items():
        figure.add_bar(
            x=[value], y=[""], orientation="h", name=f"{name}: {value:.0f} s",
            marker={"color": colours[name]}, text=[f"{value / total:.0%}"], textangle=0,
            textposition="inside", insidetextanchor="middle",
            hovertemplate=f"{name}: {value:.1f} s ({value / total:.0%})<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack")
    figure = _finish(figure, x_title="seconds", y_title="")
    figure.update_layout(height=190, legend={"traceorder": "normal"})
    return figure


def to_html(figure: go.Figure, name: str) -> str:
    """Give the `div` of a chart; the page holds the library once."""
    return str(
        plotly.io.to_html(
            figure, full_html=False, include_plotlyjs=False, div_id=f"chart-{name}", config=CONFIG
        )
    )


def to_json(figure: go.Figure) -> str:
    """Give a chart as JSON that plotly reads back."""
    return str(figure.to_json())


def library_script() -> str:
    """Give the source of the drawing library, to stand inside a page that works offline."""
    return str(plotly.offline.get_plotlyjs())


Slots = tuple[list[float], float, int]
"""Centres of some bars, their width, and the column of their panel."""


def _add_state_bars(
    figure: go.Figure, own: Sequence[StateBytes], name: str, hue: Hue, slots: Slots
) -> None:
    centres, width, column = slots
    for part, colour in {
        "parameters": hue.dark, "gradients": hue.base, "optimizer": hue.light,
    }.items():  # fmt: skip
        figure.add_bar(
            x=centres, y=[getattr(s, part) / 2**20 for s in own], width=width,
            name=f"{name}: {part}", legendgroup=f"{name}: {part}", showlegend=column == 1,
            marker={"color": colour}, row=1, col=column,
            hovertemplate="%{y:.2f} MiB measured<extra>" + f"{name}: {part}" + "</extra>",
        )  # fmt: skip


def _add_formula_marks(
    figure: go.Figure, own: Sequence[StateBytes], slots: Slots, is_first: bool
) -> None:
    """Draw a short line across each bar at the bytes of each closed form."""
    centres, width, column = slots
    for part, (name, colour, dash) in FORMULA_MARKS.items():
        x: list[float | None] = []
        y: list[float | None] = []
        for centre, state in zip(centres, own, strict=True):
            height = getattr(state.formula, part) / 2**20
            x += [centre - width / 2, centre + width / 2, None]
            y += [height, height, None]
        figure.add_scatter(
            x=x, y=y, name=name, mode="lines", legendgroup=part,
            showlegend=is_first and column == 1, row=1, col=column,
            line={"color": colour, "width": 2.5, "dash": dash},
            hovertemplate="%{y:.2f} MiB<extra>" + name + "</extra>",
        )  # fmt: skip


def _error_bars(half_widths: Sequence[float | None], colour: str) -> dict[str, object]:
    return {
        "type": "data",
        "array": list(half_widths),
        "color": colour,
        "thickness": 1.2,
        "width": 3,
    }


def _say_positions(bin_: PositionBin) -> str:
    if bin_.first == bin_.last:
        return f"position {bin_.first}"
    return f"mean of positions {bin_.first} to {bin_.last}"


def _add_reference(figure: go.Figure, value: float, text: str) -> None:
    figure.add_hline(
        y=value, line={"color": MUTED, "width": 1.2, "dash": "dash"}, annotation_text=text,
        annotation_position="top right", annotation_font={"color": MUTED, "size": 12},
    )  # fmt: skip


def _log_lengths(figure: go.Figure, families: Sequence[FamilyCurves]) -> None:
    lengths = sorted({t.sequence_tokens for family in families for t in family.times})
    figure.update_xaxes(type="log", tickvals=lengths, ticktext=[str(n) for n in lengths])


def _log_ticks(families: Sequence[FamilyCurves]) -> list[float]:
    """Choose round ticks for a log axis of milliseconds, evenly spaced over a narrow range."""
    quartiles = [t.quartiles for family in families for t in family.times]
    low = 1e3 * min(q.low for q in quartiles)
    high = 1e3 * max(q.high for q in quartiles)
    if high > 5 * low:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    rough = max(high - low, 0.01 * high) / 4
    decade = 10.0 ** math.floor(math.log10(rough))
    step = decade * min((1, 2, 5, 10), key=lambda digit: abs(math.log(digit * decade / rough)))
    return [step * n for n in range(math.floor(low / step), math.ceil(high / step) + 1) if n > 0]


def _finish(figure: go.Figure, x_title: str, y_title: str) -> go.Figure:
    figure.update_layout(
        template="plotly_white", height=380, font={"family": FONT, "size": 13, "color": INK},
        margin={"l": 64, "r": 20, "t": 28, "b": 56}, hoverlabel={"font": {"family": FONT}},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.04, "xanchor": "left", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    figure.update_xaxes(title_text=x_title, gridcolor=GRID, linecolor=MUTED, automargin=True)
    figure.update_yaxes(title_text=y_title, gridcolor=GRID, automargin=True, zeroline=False)
    return figure
