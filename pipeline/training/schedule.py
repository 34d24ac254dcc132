"""The learning rate of each step, as a pure function of the step."""

import math

from pipeline.config.schema import ScheduleConfig


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Give the learning rate of one step.

    With s = step + 1 and W warm-up steps, the rate rises linearly to the peak at s = W. cosine then
    falls along half a cosine to `final_fraction` of the peak at the last step. wsd stays at the
    peak and falls over the last D steps as 1 - sqrt(x), x from 0 to 1, to the same end.

    Args:
        step: Steps done before this one, from 0.
        total_steps: Steps of the whole run.
        peak: Largest rate.
        schedule: Kind and phases.

    Source: cosine: Loshchilov and Hutter 2017, eq. 5; wsd with the (1 - sqrt) cool-down: Haegele et
    al. 2024, section 3.
    """
    position = step + 1
    warmup_steps = round(schedule.warmup_fraction * total_steps)
    if position <= warmup_steps:
        return peak * position / warmup_steps
    floor = schedule.final_fraction
    if schedule.kind == "cosine":
        progress = min(1.0, (position - warmup_steps) / (total_steps - warmup_steps))
        return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    decay_steps = min(round(schedule.decay_fraction * total_steps), total_steps - warmup_steps)
    if position <= total_steps - decay_steps:
        return peak
    progress = min(1.0, (position - (total_steps - decay_steps)) / decay_steps)
    return peak * (floor + (1.0 - floor) * (1.0 - math.sqrt(progress)))
