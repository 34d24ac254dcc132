"""Training: one loop for every model family, over engines that differ only in what they split.

Importing this package loads nothing; `ENGINES` names where each engine lives.
"""

ENGINES = {
    "deepspeed": "pipeline.training.deepspeed_engine:DeepSpeedEngine",
    "torch": "pipeline.training.torch_engine:TorchEngine",
}
"""Engine name to class; all take `(model, run, plan, ranks)`."""
