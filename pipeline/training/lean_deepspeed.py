"""From `import deepspeed` to the same without what it loads for parts that nothing here uses.

Its autotuner loads MLflow, which brings pandas and FastAPI along: 4.6 s of the 5.5 s that DeepSpeed
takes to load after torch, in every rank. Its ZeRO stages load the Muon optimizer, whose functions
are handed to `torch.compile`, which loads the compiler: 3 s.
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


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let DeepSpeed's `@compiler.compile()` leave functions as they are while the block runs."""
    original = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        yield
    finally:
        compiler.compile = original


with missing("mlflow"):
    import deepspeed
    from deepspeed.runtime import compiler
with uncompiled():
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401 - the stages find it loaded

__all__ = ["deepspeed"]
