"""Latent rewards, image rewards and weighted sums: the classes, loading by name, preference losses and training."""
