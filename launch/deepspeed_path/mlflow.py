"""From `import mlflow` to an error, in DeepSpeed's launchers and in ranks.

DeepSpeed's autotuner loads MLflow where it can, which takes each of these processes 4 s. Nothing of
theirs uses it.
"""

raise ImportError("MLflow is kept from DeepSpeed's launchers and from ranks; neither uses it")
