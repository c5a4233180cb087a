"""Reward classes for latents, images and weighted sums; loading by name; preference losses; reward training."""
