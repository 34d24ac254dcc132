"""From the death of a parent, however it died, to a signal for its child."""

import ctypes
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1


def signal_on_parent_death(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent is gone; on Linux only.

    Args:
        number: SIGKILL ends this process; SIGCONT lets one that is held still go on.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, number)
