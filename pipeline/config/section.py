"""What every part of a config is made of: an immutable section, and types that several share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name that is safe as a directory and in a command: letters, digits, dot, dash, underscore."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A seed that every generator takes."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of a config: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_multiple(name: str, value: int, unit: int, unit_text: str) -> None:
    """Raise unless `value` is a positive multiple of `unit`, naming the nearest legal values.

    Raises:
        ValueError: With value, unit and the neighbours on both sides.
    """
    if value % unit == 0:
        return
    low = value // unit * unit
    nearest = " or ".join(str(v) for v in (low, low + unit) if v > 0)
    raise ValueError(f"{name}={value} is not a multiple of {unit_text}={unit}; nearest: {nearest}")
