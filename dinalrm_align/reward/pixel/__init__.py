"""Rewards that look at pixels, behind the call signature of `LatentReward`: decode the latents once, then score."""
