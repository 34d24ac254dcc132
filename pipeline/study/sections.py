"""From a result and its records to the sections of a report, with their charts and tables."""

from collections.abc import Iterable, Mapping

from pipeline.study import figures
from pipeline.study.figures import FamilyCurves
from pipeline.study.outcome import FamilyResult, StudyResult, WallTime
from pipeline.study.page import Chart, Fact, Page, Section
from pipeline.study.palette import HUES, PHASE_COLOURS, Hue
from pipeline.study.prose import how_to_read, limits, say_wall_time, subtitle
from pipeline.study.records import StudyRecords
from pipeline.study.series import (
    LossCurve,
    at_largest_world,
    bin_positions,
    loss_curve,
    mean_curve,
    mean_positions,
    position_gaps,
    state_bytes,
    step_times,
)
from pipeline.study.tables import (
    tabulate_environment,
    tabulate_families,
    tabulate_probes,
    tabulate_runs,
    tabulate_state,
    tabulate_step_times,
)
from pipeline.study.wording import say_count, say_estimate, say_ranks, say_seconds


class ReportBuilder:
    """Builds the sections of one report and keeps the charts it draws."""

    def __init__(self, result: StudyResult, records: StudyRecords) -> None:
        """Take the series out of the records.

        Args:
            result: What was found.
            records: What it was found in.
        """
        self.result = result
        self.records = records
        self.figure_json: dict[str, str] = {}
        """Name of a chart to its plotly JSON."""
        self.names = {family.label: family.display_name for family in result.families}
        self.hues = {label: HUES[i % len(HUES)] for i, label in enumerate(self.names)}
        self.all_times = step_times(records.probes.values())
        self.times = at_largest_world(self.all_times)
        self.states = state_bytes(records.probes.values())
        self.curves = [self._family_curves(family) for family in result.families]

    def build(self) -> Page:
        """Give the page; a section whose measurements are all missing is left out."""
        sections = [
            self._missing(),
            self._learning(),
            self._positions(),
            self._step_time(),
            self._memory(),
            self._runs(),
            self._wall_time(),
            Section(title="How to read this", points=how_to_read(self.result, self.records)),
            Section(
                title="What a run this small cannot show", points=limits(self.result, self.records)
            ),
            self._environment(),
        ]
        return Page(
            title=f"Study {self.result.study}",
            subtitle=subtitle(self.result, self.records),
            status=self.result.status,
            facts=self._facts(),
            findings=self.result.headline or ["No finding: nothing was measured."],
            sections=[section for section in sections if section is not None],
        )

    def _family_curves(self, family: FamilyResult) -> FamilyCurves:
        runs = self.records.runs_of(family.label)
        positions = mean_positions(runs)
        slope = family.step_time_slope
        return FamilyCurves(
            name=family.display_name,
            hue=self.hues[family.label],
            training=_known(loss_curve(run, "train") for run in runs),
            validation=_known(loss_curve(run, "eval") for run in runs),
            positions=bin_positions(positions) if positions else [],
            times=[t for t in self.times if t.label == family.label],
            slope_text="" if slope is None else say_estimate(slope, 3),
        )

    def _chart(
        self, name: str, title: str, caption: str, figure: figures.Figure, is_wide: bool = False
    ) -> Chart:
        self.figure_json[name] = figures.to_json(figure)
        div = figures.to_html(figure, name)
        return Chart(name=name, title=title, caption=caption, div=div, is_wide=is_wide)

    def _facts(self) -> list[Fact]:
        facts = []
        for family in self.result.families:
            if family.loss is not None:
                loss = say_estimate(family.loss, 3)
                facts.append(Fact(name=family.display_name, value=loss, unit="nats/token"))
        if self.result.baseline is not None:
            floor = f"{self.result.baseline.unigram_entropy_nats:.3f}"
            facts.append(Fact(name="Unigram entropy", value=floor, unit="nats/token"))
        for family in self.result.families:
            if family.tokens_per_second is not None:
                speed = say_count(family.tokens_per_second.value)
                facts.append(Fact(name=family.display_name, value=speed, unit="tokens/s"))
        if self.result.wall_time.total_seconds > 0:
            seconds = say_seconds(self.result.wall_time.total_seconds)
            facts.append(Fact(name="Time of all cells", value=seconds, unit=""))
        return facts

    def _missing(self) -> Section | None:
        if not self.result.missing and all(check.passed for check in self.result.checks):
            return None
        points = [f"Cell {cell} has no result: {why}" for cell, why in self.result.missing.items()]
        points += [check.text for check in self.result.checks if not check.passed]
        return Section(title="What is missing or failed", points=points)

    def _learning(self) -> Section | None:
        if not any(curves.validation for curves in self.curves):
            return None
        floor = self.result.baseline.unigram_entropy_nats if self.result.baseline else None
        caption = (
            "Thin lines: loss of the training batch. Markers: loss over all validation tokens. "
            "Dashed: the best that a model without context can reach."
        )
        return Section(
            title="Learning",
            charts=[
                self._chart(
                    f"loss-{axis}", title, caption, figures.draw_loss(self.curves, axis, floor)
                )
                for axis, title in (
                    ("tokens", "Loss over training tokens"),
                    ("seconds", "Loss over wall time"),
                )
            ],
            tables=[tabulate_families(self.result.families)],
        )

    def _positions(self) -> Section | None:
        drawn = [curves for curves in self.curves if curves.positions]
        if not drawn:
            return None
        charts = [
            self._chart(
                "positions",
                "Loss by position in the sample",
                "Mean validation loss over bins of neighbouring positions. Bars: 95% intervals "
                "from the scatter of the positions in a bin, not of runs, where it has eight or "
                "more.",
                figures.draw_positions(drawn),
            )
        ]
        for family in self.result.families:
            if family.label != self.records.reference:
                charts += self._gap_chart(family)
        return Section(title="Use of context", charts=charts)

    def _gap_chart(self, family: FamilyResult) -> list[Chart]:
        reference = self.records.reference
        runs, others = (self.records.runs_of(label) for label in (family.label, reference))
        gap = mean_curve(position_gaps(runs, others))
        if gap is None:
            return []
        name = f"{family.display_name} minus {self.names[reference]}"
        chart = self._chart(
            f"position-gap-{family.label}",
            name,
            f"Below zero, {family.display_name} predicts better. Both were scored on the same "
            "tokens, so the difference scatters less than the losses. Bars: 95% intervals from "
            "the scatter of the positions in a bin, not of runs.",
            figures.draw_position_gap(name, bin_positions(gap), self.hues[family.label]),
        )
        return [chart]

    def _step_time(self) -> Section | None:
        if not self.times:
            return None
        num_rounds = len(self.times[0].step_seconds)
        ranks = say_ranks(self.times[0].world_size)
        return Section(
            title="Sequence length and speed",
            charts=[
                self._chart(
                    "step-time",
                    "Step time at a fixed number of tokens a step",
                    f"Medians of {num_rounds} interleaved rounds on {ranks}; bars: quartiles. "
                    "Lines: power laws through the medians. Exponents in the legend: means over "
                    "the rounds with 95% intervals; 0 is a step that takes equally long at every "
                    "length.",
                    figures.draw_step_time(self.curves),
                ),
                self._chart(
                    "throughput",
                    "Throughput",
                    f"Tokens of a step over the median step time, {ranks} together.",
                    figures.draw_throughput(self.curves),
                ),
            ],
            tables=[tabulate_step_times(self.all_times, self.names)],
        )

    def _memory(self) -> Section | None:
        charts = []
        if self.states:
            charts.append(
                self._chart(
                    "model-state",
                    "Model state of a rank under ZeRO",
                    "Bars: bytes of the engine's own tensors on the fullest rank. Dotted: the "
                    "formula of Rajbhandari et al. (2020) for fp32 AdamW, 4N for parameters, 4N "
                    "for gradients and 8N for moments, split over the ranks from stages 3, 2 "
                    "and 1 on. Solid: the same with the 4N of master weights that DeepSpeed's "
                    "stages 1 to 3 keep beside the weights even in fp32, split over the ranks.",
                    figures.draw_state(self.states, self.names, self.hues),
                    is_wide=True,
                )
            )
        peaks = {f.display_name: f.peak_bytes for f in self.result.families if f.peak_bytes}
        if peaks:
            charts.append(self._peak_chart({n: e.value / 2**20 for n, e in peaks.items()}))
        if not charts:
            return None
        tables = [tabulate_state(self.states, self.names)] if self.states else []
        return Section(title="Memory", charts=charts, tables=tables)

    def _peak_chart(self, peaks: Mapping[str, float]) -> Chart:
        hues: dict[str, Hue] = {self.names[label]: hue for label, hue in self.hues.items()}
        return self._chart(
            "peak-memory",
            "Peak memory of a training rank",
            "The largest rank of the training run, interpreter and libraries included.",
            figures.draw_bars(peaks, hues, "MiB"),
            is_wide=True,
        )

    def _runs(self) -> Section:
        return Section(
            title="Runs and probes",
            tables=[*tabulate_runs(self.records), tabulate_probes(self.records)],
        )

    def _wall_time(self) -> Section | None:
        wall = self.result.wall_time
        if wall.step_fraction is None:
            return None
        return Section(
            title="Where the time went",
            paragraphs=[say_wall_time(wall)],
            charts=[
                self._chart(
                    "wall-time",
                    "Seconds by what they went into",
                    "All cells and the preparation of the text; writing this report is not in it.",
                    figures.draw_shares(split_wall_time(wall), PHASE_COLOURS),
                    is_wide=True,
                )
            ],
        )

    def _environment(self) -> Section:
        table = tabulate_environment(self.records)
        return Section(
            title="Checks and environment",
            points=[check.text for check in self.result.checks],
            tables=[table] if table else [],
        )


def split_wall_time(wall: WallTime) -> dict[str, float]:
    """Give the seconds of each part of a study, in the order of `PHASE_COLOURS`."""
    parts = (
        wall.training_step_seconds,
        wall.timed_step_seconds,
        wall.train_cell_seconds - wall.training_step_seconds,
        wall.probe_cell_seconds - wall.timed_step_seconds,
        wall.prepare_seconds,
    )
    return dict(zip(PHASE_COLOURS, parts, strict=True))


def _known(curves: Iterable[LossCurve]) -> list[LossCurve]:
    return [curve for curve in curves if curve.steps]
