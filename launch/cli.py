"""The command line: `python -m launch VERB`.

Nothing heavy is loaded here: a verb loads what it needs when it runs, so that help, a dry run and
the refusal of a wrong config come at once.
"""

import sys
from collections.abc import Sequence

import typer

from launch import (
    verbs_bench,
    verbs_cluster,
    verbs_data,
    verbs_estimate,
    verbs_model,
    verbs_run,
    verbs_study,
    verbs_tracking,
)
from pipeline.errors import PipelineError

app = typer.Typer(
    help=(
        "Pretrain GPT-style and LSTM-attention language models side by side and compare them. "
        "Every verb that takes a config takes a.b=c overrides after it. "
        "Exit codes: 0 done, 1 failed, 2 wrong usage or config, 75 stopped with a checkpoint, "
        "130 interrupted."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
VERBS = (
    verbs_study,
    verbs_run,
    verbs_estimate,
    verbs_bench,
    verbs_data,
    verbs_model,
    verbs_tracking,
    verbs_cluster,
)
for verbs in VERBS:
    verbs.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; our own errors become one message and an exit code.

    Args:
        arguments: Command line without the program; None takes the process's own.

    Returns:
        The exit code.
    """
    try:
        app(arguments, prog_name="python -m launch")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except PipelineError as exc:
        sys.stdout.flush()
        print(f"{exc.kind}: {exc}", file=sys.stderr, flush=True)
        return exc.exit_code
    return 0
