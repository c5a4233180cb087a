"""Prompt files and data sets of preference pairs."""
