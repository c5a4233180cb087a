"""Comparison of alignment runs: gains with confidence intervals, cost, figures, and a page in HTML and Markdown."""
