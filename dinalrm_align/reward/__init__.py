"""Rewards: latent and image rewards, weighted sums, loading by name, preference losses, training of a reward."""
