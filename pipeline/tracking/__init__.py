"""Events and results of runs on disk, and their replica in MLflow."""
