"""Alignment methods, and the evaluation of the policies they train."""
