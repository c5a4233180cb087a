"""Comparison of alignment runs: gains in score with confidence intervals, cost, figures, HTML and Markdown pages."""
