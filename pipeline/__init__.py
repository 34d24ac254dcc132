"""Tandem's library: config, data, models, training, tracking, studies and probes.

Layers (imports point downwards only; `tests/test_architecture.py` enforces it)::

    probes | inference
    study | training
    data | models | tracking
    config
    errors
"""
