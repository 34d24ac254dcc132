"""Measurements that need the models but are not training runs; importing this loads nothing."""

PROBES = {
    "step_time": "pipeline.probes.step_time:run",
    "bench": "pipeline.probes.bench:run",
    "machine": "pipeline.probes.machine:run",
    "model_state": "pipeline.probes.model_state:run",
}
"""Probe name to function; all take `(runs, context)` on every rank and give the records to keep."""
