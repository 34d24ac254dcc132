"""Numbers as people read them: units, thousands, intervals."""

from pipeline.study.fits import Estimate

QUANTITIES = {
    "non_embedding_parameters": "non-embedding parameters",
    "total_parameters": "total parameters",
}
"""Matched quantities as people name them."""

MINUS = "\N{MINUS SIGN}"


def say_count(value: float) -> str:
    """Give a whole number with thousands separators."""
    return f"{round(value):,}"


def say_ranks(num_ranks: int) -> str:
    """Give a world size with its noun."""
    return f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"


def say_bytes(value: float) -> str:
    """Give bytes in the binary unit that leaves one to four digits before the point."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f} B"


def say_seconds(value: float) -> str:
    """Give a duration: milliseconds, seconds, or minutes and seconds."""
    if value < 1.0:
        return f"{value * 1e3:,.0f} ms"
    if value < 120.0:
        return f"{value:,.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s"


def say_number(value: float, digits: int) -> str:
    """Give a number with a real minus sign; what rounds to zero has no sign."""
    text = f"{abs(value):.{digits}f}"
    is_negative = value < 0 and float(text) != 0
    return f"{MINUS}{text}" if is_negative else text


def say_estimate(estimate: Estimate, digits: int) -> str:
    """Give a value and half the width of its 95% interval, where it has one."""
    text = say_number(estimate.value, digits)
    if estimate.half_width is None:
        return text
    return f"{text} \N{PLUS-MINUS SIGN} {estimate.half_width:.{digits}f}"


def say_list(parts: list[str]) -> str:
    """Join parts with commas and a last `and`."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
