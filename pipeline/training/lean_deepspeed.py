"""From `import deepspeed` to the same without MLflow, which its autotuner loads where it can.

MLflow brings pandas and FastAPI along: 4.6 s of the 5.5 s that DeepSpeed takes to load after torch,
in every rank. Nothing here uses the autotuner.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def missing(package: str) -> Iterator[None]:
    """Let a package seem not to be installed while the block runs; one that is loaded stays."""
    if package in sys.modules:
        yield
        return
    # Python takes this for "cannot be imported".
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


with missing("mlflow"):
    import deepspeed

__all__ = ["deepspeed"]
