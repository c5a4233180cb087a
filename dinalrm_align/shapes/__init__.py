"""The embedded world: a small, real SD3-architecture text-to-image stack over procedural pictures, with an exact oracle."""
