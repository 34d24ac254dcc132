import pytest

from pipeline.tracking.goodput import describe_goodput, goodput_fraction


def test_time_stopped_on_request_is_not_held_against_a_run() -> None:
    spent = {"train": 60.0, "init": 15.0, "idle": 25.0, "wall": 100.0}
    assert goodput_fraction(spent) == pytest.approx(0.8)
    assert goodput_fraction({"train": 0.0, "wall": 10.0}) is None


def test_the_line_names_the_largest_parts_first_and_leaves_out_crumbs() -> None:
    goodput = {
        "train_seconds": 71.0, "init_seconds": 20.0, "checkpoint_seconds": 8.5,
        "tracking_seconds": 0.5, "wall_seconds": 100.0,
    }  # fmt: skip
    told = describe_goodput(goodput)
    assert told == "where 100 s went: 71% training, 20% starting, 8% checkpoints"
    assert describe_goodput({}) is None
