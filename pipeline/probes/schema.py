"""What the arguments of all probes and synthetic tasks have in common."""

from pydantic import BaseModel, ConfigDict


class ProbeParams(BaseModel):
    """Arguments of a probe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
