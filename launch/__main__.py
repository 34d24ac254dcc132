"""`python -m launch`: the command line as a process."""

import signal
import sys
from types import FrameType

from launch.cli import main


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """Treat SIGTERM as Ctrl-C, so that whatever is open is closed in order."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main())
