"""Comparison of alignment runs: paired gains with intervals, cost, figures and a page."""
