"""What a person or a program sees: progress while ranks work, and the answer at the end.

On a terminal there is one progress bar, elsewhere plain lines. With `--json` the answer alone is
on standard output, and everything else on standard error.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.load import read_run

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

    from pipeline.study.execute import Launcher
    from pipeline.tracking.store import Verdict

POLL_SECONDS = 1.0
PLAIN_LINE_SECONDS = 15.0
"""Time between two progress lines where there is no terminal."""


class Display:
    """Shows what happens; one a command."""

    def __init__(self, *, as_json: bool) -> None:
        """Choose the streams.

        Args:
            as_json: Whether the answer is JSON on standard output.
        """
        from rich.console import Console

        self.as_json = as_json
        self.console: Console = Console(stderr=as_json, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """Show one line about what happens now."""
        self.console.print(line, markup=False)

    def show(self, renderable: "RenderableType") -> None:
        """Show a table or another thing that fills the width it is given."""
        self.console.print(renderable, soft_wrap=False)

    def pass_on(self, text: str) -> None:
        """Show output of another process as it is, without adding line ends."""
        self.console.out(text, end="", highlight=False)

    def answer(self, payload: Mapping[str, Any], lines: Sequence[str] = ()) -> None:
        """Give the command's result: the payload as JSON, or the lines for a person."""
        if self.as_json:
            sys.stdout.write(json.dumps(payload, indent=2, default=str) + "\n")
            sys.stdout.flush()
            return
        for line in lines:
            self.say(line)

    @contextmanager
    def watch(self, run_dir: Path) -> Iterator[None]:
        """Show how far a run is, from its event log, while the block runs."""
        tail = EventTail(path=run_dir / "events.jsonl")
        total_steps = None
        if not (run_dir / "probe.yaml").is_file():
            total_steps = read_run(run_dir).train.total_steps
        ended = threading.Event()
        follow = self._follow_on_bar if self.console.is_terminal else self._follow_in_lines
        arguments = (run_dir.name, tail, total_steps, ended)
        thread = threading.Thread(target=follow, args=arguments, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _follow_in_lines(
        self, name: str, tail: "EventTail", total_steps: int | None, ended: threading.Event
    ) -> None:
        shown_at = time.monotonic()
        while not ended.wait(POLL_SECONDS):
            tail.read()
            if total_steps and tail.step and time.monotonic() - shown_at >= PLAIN_LINE_SECONDS:
                shown_at = time.monotonic()
                self.say(f"  {name}: {tail.describe(total_steps)}")

    def _follow_on_bar(
        self, name: str, tail: "EventTail", total_steps: int | None, ended: threading.Event
    ) -> None:
        with self._bar() as bar:
            task = bar.add_task(name, total=total_steps, note="")
            while not ended.wait(POLL_SECONDS):
                tail.read()
                if total_steps:
                    note = tail.describe(total_steps)
                    bar.update(task, completed=tail.step, note=note)

    def _bar(self) -> "Progress":
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            refresh_per_second=2,
            transient=True,
        )


@dataclass(kw_only=True)
class EventTail:
    """Reads an event log as it grows, keeping only what progress needs."""

    path: Path
    step: int = 0
    """Optimizer steps done."""
    loss: float | None = None
    """Latest training loss, nats per token."""
    _offset_bytes: int = 0
    _marks: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin at the end of what earlier attempts wrote."""
        if self.path.exists():
            # A killed attempt may have left half a line, which the next one cuts off.
            self._offset_bytes = self.path.read_bytes().rfind(b"\n") + 1

    def read(self) -> None:
        """Take in the lines written since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._offset_bytes)
            complete, newline, _ = stream.read().rpartition(b"\n")
        self._offset_bytes += len(complete) + len(newline)
        for line in complete.splitlines():
            event = json.loads(line)
            self.step = event["step"]
            self._marks = [*self._marks[-19:], (event["time_unix_seconds"], event["step"])]
            loss = event["values"].get("train/loss")
            if loss is not None:
                self.loss = float(loss)

    def describe(self, total_steps: int) -> str:
        """Say step, loss and the time that is left at the pace of the last events."""
        parts = [f"step {self.step}/{total_steps}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self._marks and self.step > self._marks[0][1]:
            seconds = self._marks[-1][0] - self._marks[0][0]
            pace = seconds / (self.step - self._marks[0][1])
            parts.append(f"{format_seconds(pace * (total_steps - self.step))} left")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class WatchedLauncher:
    """A launcher whose runs are shown while they work."""

    launcher: "Launcher"
    display: Display

    def run(
        self, run_dir: Path, *, num_workers: int, stop_after_steps: int | None = None
    ) -> "Verdict":
        """Run as the launcher does, and show progress."""
        with self.display.watch(run_dir):
            return self.launcher.run(
                run_dir, num_workers=num_workers, stop_after_steps=stop_after_steps
            )

    def command(self, run_dir: Path, *, num_workers: int) -> list[str]:
        """Give the launcher's command."""
        return self.launcher.command(run_dir, num_workers=num_workers)


def format_seconds(seconds: float) -> str:
    """Print a duration the way a person reads it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
