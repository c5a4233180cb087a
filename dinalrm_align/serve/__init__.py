"""Rewards over HTTP: `python -m dinalrm_align.serve`."""
