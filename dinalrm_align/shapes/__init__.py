"""The embedded world: a small, real SD3-architecture stack over procedural pictures, with an oracle."""
