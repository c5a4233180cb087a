"""Runs of any recipes and rewards on one page: which aligned faster, at what cost, and whether it was hacked."""
