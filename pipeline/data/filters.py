"""From a cleaning config to the filters that decide which documents stay."""

from pipeline.config.data import CleanConfig
from pipeline.data.split_reader import Cleaner


def build_cleaner(config: CleanConfig) -> Cleaner | None:
    """Build the filters of a config; None where there are none."""
    del config
    return None


def check_filters(config: CleanConfig) -> None:
    """Refuse filters that cannot be had."""
    del config
