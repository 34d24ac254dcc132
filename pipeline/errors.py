"""The exceptions that callers of the pipeline meet, one tree.

::

    PipelineError
      ConfigError        a config is wrong or contradicts itself        exit code 2
      DataError          input text or prepared shards are unusable     exit code 1
      CheckpointError    a checkpoint cannot be written or trusted      exit code 1
      TrainingDiverged   loss or gradients stayed non-finite            exit code 1
      TrackingError      the tracking store refused                     exit code 1
      LaunchError        ranks could not be started, or one was lost    exit code 1
"""


class PipelineError(Exception):
    """Any failure that this project explains; `exit_code` is what the command line returns."""

    exit_code = 1

    @property
    def kind(self) -> str:
        """Name of the class of this tree that it belongs to; modules derive narrower ones."""
        return next(c.__name__ for c in type(self).__mro__ if c.__module__ == __name__)


class ConfigError(PipelineError):
    """A config has an unknown key, an illegal value, or two values that contradict each other."""

    exit_code = 2


class DataError(PipelineError):
    """Source text or prepared shards are missing, malformed or not what the config names."""


class CheckpointError(PipelineError):
    """A checkpoint is missing, incomplete, damaged or belongs to another run."""


class TrainingDiverged(PipelineError):
    """Training produced non-finite losses or gradients for too many steps in a row."""


class TrackingError(PipelineError):
    """The tracking store refused an event or cannot be reached."""


class LaunchError(PipelineError):
    """Ranks could not be started, one of them was lost, or no verdict was left behind."""
