"""Training loop, checkpoints, metrics, configuration, command lines, and reading and writing of files."""
