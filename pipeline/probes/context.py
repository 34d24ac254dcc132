"""What a probe is given besides the runs, and how it reads its own arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config.explain import validate
from pipeline.probes.schema import ProbeParams
from pipeline.training.distributed import RankContext

ParamsType = TypeVar("ParamsType", bound=ProbeParams)


@dataclass(frozen=True, kw_only=True)
class ProbeContext:
    """The rank group of a probe and the arguments of this cell."""

    ranks: RankContext
    run_dir: Path
    """Directory of the probe cell."""
    params: Mapping[str, Any]
    """Arguments as the study states them."""
    on_event: Callable[[str], None]
    """Takes one line for people; does nothing on ranks other than 0."""

    def parse_params(self, schema: type[ParamsType]) -> ParamsType:
        """Check the arguments against the probe's own schema.

        Raises:
            ConfigError: A key is unknown or missing, or a value is illegal.
        """
        return validate(schema, dict(self.params), f"probe cell {self.run_dir.name}, params")
