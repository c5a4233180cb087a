"""The embedded world: a small SD3-architecture stack trained on procedural images, with an oracle score."""
