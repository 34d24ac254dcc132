"""The colours and the type of a report.

Hues are those of Okabe and Ito (2008, "Color Universal Design"), which stay apart for colour-blind
readers; each family also has a marker of its own, so that print in grey still tells them apart.
"""

from dataclasses import dataclass

INK = "#1b2430"
MUTED = "#6b7684"
GRID = "#e6eaef"
FONT = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', Arial, sans-serif"
)


@dataclass(frozen=True, kw_only=True)
class Hue:
    """How one family is drawn."""

    base: str
    dark: str
    light: str
    symbol: str


HUES = (
    Hue(base="#0072b2", dark="#004d78", light="#7db8dc", symbol="circle"),
    Hue(base="#d55e00", dark="#8f3f00", light="#f2ac79", symbol="diamond"),
    Hue(base="#009e73", dark="#00674b", light="#7fcfb9", symbol="square"),
    Hue(base="#cc79a7", dark="#8f4f74", light="#e6bdd3", symbol="triangle-up"),
    Hue(base="#7a6a00", dark="#544900", light="#cfc57a", symbol="x"),
)
"""One for each family, in the order of the study; further families begin again."""

PHASE_COLOURS = {
    "training steps": "#2f6f4f",
    "timed steps of the probes": "#6aa583",
    "evaluation, start and end of training runs": "#b9c3cd",
    "engines and starts of the probes": "#d3dae1",
    "preparing the data": "#8b98a6",
}
"""Green is what the study is for, grey is what it costs."""
