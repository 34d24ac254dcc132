import pytest

from pipeline.config.schema import ScheduleConfig
from pipeline.training.schedule import learning_rate


def rates(total_steps: int, **fields: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(fields)
    return [learning_rate(step, total_steps, 2.0, schedule) for step in range(total_steps)]


def test_warmup_rises_linearly_and_ends_at_the_peak() -> None:
    values = rates(20, warmup_fraction=0.2)
    assert values[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert max(values) == values[3]


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_the_floor() -> None:
    values = rates(20, kind="cosine", warmup_fraction=0.2, final_fraction=0.1)
    # 16 steps of decay follow step 4: the middle is step 12, the end step 20.
    assert values[11] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert values[19] == pytest.approx(0.2)
    assert values[7] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + 2**-0.5)))


def test_wsd_holds_the_peak_and_cools_down_by_the_root() -> None:
    values = rates(20, kind="wsd", warmup_fraction=0.1, decay_fraction=0.2, final_fraction=0.0)
    assert values[:2] == [1.0, 2.0]
    assert values[2:16] == [2.0] * 14
    assert values[16:] == pytest.approx([2 * (1 - x**0.5) for x in (0.25, 0.5, 0.75, 1.0)])


def test_no_warmup_starts_at_the_peak() -> None:
    assert rates(10, kind="wsd", warmup_fraction=0.0)[0] == 2.0
    assert rates(1, kind="cosine", warmup_fraction=0.0, final_fraction=0.1) == pytest.approx([0.2])


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_warmup_over_the_whole_run_never_divides_by_zero(kind: str) -> None:
    values = rates(4, kind=kind, warmup_fraction=1.0, decay_fraction=0.0)
    assert values == [0.5, 1.0, 1.5, 2.0]


def test_rate_beyond_the_last_step_stays_at_the_floor() -> None:
    for kind in ("cosine", "wsd"):
        schedule = ScheduleConfig(kind=kind, final_fraction=0.1)
        assert learning_rate(50, 20, 1.0, schedule) == pytest.approx(0.1)
