"""The report opens offline, shows every chart, and says in words what the records hold."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.study.execute import report_study
from pipeline.study.fits import Estimate
from pipeline.study.wording import say_bytes, say_estimate, say_list, say_number, say_seconds
from tests.study.conftest import LENGTHS, StudyOnDisk

WriteStudy = Callable[..., StudyOnDisk]
CHARTS = {
    "loss-tokens", "loss-seconds", "positions", "position-gap-lstm_attention", "step-time",
    "throughput", "model-state", "peak-memory", "wall-time",
}  # fmt: skip
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=10000", "--window-size=1400,5000", "--enable-logging=stderr",
)  # fmt: skip


@pytest.fixture
def report(write_study: WriteStudy) -> Path:
    directory = write_study().directory
    report_study(directory)
    return directory / "report.html"


def page_without_scripts(report: Path) -> str:
    return re.sub(r"<script.*?</script>", "", report.read_text(), flags=re.DOTALL)


def test_the_page_loads_nothing_from_elsewhere(report: Path) -> None:
    assert "<script src" not in report.read_text()
    markup = page_without_scripts(report)
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", markup)
    assert "@import" not in markup
    assert "url(" not in markup


def test_every_chart_stands_in_the_page_and_as_a_figure(report: Path) -> None:
    markup = page_without_scripts(report)
    assert set(re.findall(r'id="chart-([\w-]+)"', markup)) == CHARTS
    assert {path.stem for path in (report.parent / "figures").iterdir()} == CHARTS
    for path in (report.parent / "figures").iterdir():
        assert json.loads(path.read_text())["data"]


def test_the_words_hold_the_numbers_of_the_records(report: Path) -> None:
    text = (report.parent / "report.md").read_text()
    # 4 - log10(40) = 2.398, and 0.2 more.
    assert "2.398 nats/token for the Transformer and 2.598 for the LSTM with attention" in text
    assert "Transformer is better by 0.200 nats" in text
    assert "exponent 0.500 ± 0.000" in text
    assert "512 (IQR 20, n=37)" in text
    assert "One seed" in text


def test_html_and_markdown_say_the_same(report: Path) -> None:
    markdown = (report.parent / "report.md").read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", page_without_scripts(report))
    assert headings == re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE)
    for cell in re.findall(r"<td[^>]*>([^<&]*)</td>", page_without_scripts(report)):
        assert cell in markdown


def test_the_report_names_the_fields_in_which_the_families_differ(write_study: WriteStudy) -> None:
    families = {
        label: {"model": {"family": label, "depth": 2}, "train": {"optimizer": optimizer}}
        for label, optimizer in (
            ("gpt", {"learning_rate": 0.002}),
            ("lstm_attention", {"learning_rate": 0.008}),
        )
    }
    directory = write_study(fields={"families": families}).directory
    report_study(directory)
    assert (
        "Besides the model, the families differ in train.optimizer.learning_rate (0.002 for the "
        "Transformer and 0.008 for the LSTM with attention); every other field"
    ) in (directory / "report.md").read_text()


def test_families_that_differ_in_the_model_alone_are_said_to(report: Path) -> None:
    text = (report.parent / "report.md").read_text()
    assert "The families differ in the model alone" in text


def test_the_report_says_which_tokens_bits_per_byte_leave_out(report: Path) -> None:
    assert "without those that end a document" in (report.parent / "report.md").read_text()


def test_what_is_missing_is_absent_and_never_zero(write_study: WriteStudy) -> None:
    directory = write_study(without=("step_time-w2", "model_state-w1", "model_state-w2")).directory
    report_study(directory)
    text = (directory / "report.md").read_text()
    assert "Sequence length" not in text
    assert "Cell step_time-w2 has no result: rank 1 was killed" in text
    assert "| step_time-w2 | step_time | " in text
    assert re.search(r"\| step_time-w2 .* – \| – \|", text)
    assert not (directory / "figures" / "step-time.json").exists()


def test_charts_of_step_time_show_one_world_size_and_the_table_all(
    write_study: WriteStudy,
) -> None:
    directory = write_study(timed_workers=(1, 2)).directory
    report_study(directory)
    figure = json.loads((directory / "figures" / "throughput.json").read_text())
    assert [len(trace["x"]) for trace in figure["data"]] == [len(LENGTHS)] * 2
    text = (directory / "report.md").read_text()
    assert "interleaved rounds on 2 ranks" in text
    for ranks in (1, 2):
        assert len(re.findall(rf"^\| Transformer \| \d+ \| \d+ \| {ranks} \|", text, re.M)) == 4


def test_names_from_a_config_cannot_become_markup(write_study: WriteStudy) -> None:
    study = write_study(without=("gpt-seed0",))
    timeline = study.directory / "timeline.jsonl"
    timeline.write_text(timeline.read_text().replace("rank 1 was killed", "<script>alert(1)"))
    report_study(study.directory)
    assert "&lt;script&gt;alert(1)" in (study.directory / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.needs_program("chromium")
def test_a_browser_draws_every_chart_without_error_or_request(report: Path, tmp_path: Path) -> None:
    # The page's own policy forbids every request, and a forbidden one is an error on the console.
    assert "default-src 'none'" in report.read_text()[:400]
    browser = shutil.which("chromium")
    assert browser is not None, "this test needs chromium"
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command.append(report.as_uri())
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    for chart in CHARTS:
        start = done.stdout.index(f'id="chart-{chart}"')
        assert 'class="main-svg"' in done.stdout[start : start + 4000], chart


def test_numbers_are_worded_with_unit_sign_and_interval() -> None:
    assert say_bytes(3 * 2**20 / 2) == "1.5 MiB"
    assert say_seconds(0.25) == "250 ms"
    assert say_seconds(150) == "2 min 30 s"
    assert say_number(-0.0004, 3) == "0.000"
    assert say_number(-0.25, 2) == "\N{MINUS SIGN}0.25"
    estimate = Estimate(value=1.0, low=0.9, high=1.1, num=5)
    assert say_estimate(estimate, 2) == "1.00 ± 0.10"
    assert say_list(["a", "b", "c"]) == "a, b and c"
