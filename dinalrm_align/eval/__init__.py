"""Measurements of a reward: how often it agrees with the raters of preference pairs."""
