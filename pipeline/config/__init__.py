"""Configs: what a run, a cluster and a study are, checked before anything starts."""
