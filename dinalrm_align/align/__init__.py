"""Alignment methods, and the evaluation of the policies that they train."""
