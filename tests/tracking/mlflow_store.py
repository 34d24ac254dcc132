"""What an MLflow store shows, as tests read it."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class Store:
    """What MLflow shows of an output directory."""

    def __init__(self, client: "MlflowClient") -> None:
        self.client = client

    def runs(self, experiment: str = "tandem/tiny") -> "dict[str, Run]":
        """Active runs by name."""
        found = self.client.get_experiment_by_name(experiment)
        runs = self.client.search_runs([found.experiment_id])
        by_name = {run.info.run_name: run for run in runs}
        assert len(by_name) == len(runs), [run.info.run_name for run in runs]
        return by_name

    def points(self, run: "Run", name: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(run.info.run_id, name)
        return sorted((metric.step, metric.value) for metric in history)

    def count(self, experiment: str = "tandem/tiny") -> Counter[tuple[str, str]]:
        """Number of points by run and metric."""
        return Counter(
            {
                (name, metric): len(self.points(run, metric))
                for name, run in self.runs(experiment).items()
                for metric in run.data.metrics
            }
        )

    def text(self, run: "Run", name: str) -> str:
        path = self.client.download_artifacts(run.info.run_id, name)
        return Path(path).read_text()
