"""Every configuration dataclass, one module per noun, free of torch so that `--help` answers in a second."""
