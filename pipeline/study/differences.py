"""From the runs of the families to the fields in which they differ besides their models."""

from collections.abc import Mapping

from pipeline.config.schema import RunConfig
from pipeline.tracking.replica import flatten

SET_BY_THE_STUDY = ("name", "output_dir", "seed")


def list_differences(runs: Mapping[str, RunConfig]) -> dict[str, dict[str, str]]:
    """Give each config field that is not the same in all runs, the model left out.

    Args:
        runs: Label of a family to its run.

    Returns:
        Dotted name of a field to its value, as text, by label; a field that is unset is `none`.
    """
    trees = {
        label: flatten(run.model_dump(mode="json", exclude={"model", *SET_BY_THE_STUDY}))
        for label, run in runs.items()
    }
    names = sorted({name for tree in trees.values() for name in tree})
    values = {
        name: {label: tree.get(name, "none") for label, tree in trees.items()} for name in names
    }
    return {name: own for name, own in values.items() if len(set(own.values())) > 1}
