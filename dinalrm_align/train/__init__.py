"""The training loop, its checkpoints and metrics, and reading and writing of files and command lines."""
