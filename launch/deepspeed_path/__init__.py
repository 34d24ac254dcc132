"""A directory for PYTHONPATH of `deepspeed`: what it would load there without use seems missing."""
