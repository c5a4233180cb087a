"""Training loop, checkpoints, metrics, configuration dataclasses, command-line parsing and file I/O."""
