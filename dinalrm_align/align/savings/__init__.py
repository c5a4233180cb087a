"""Compare the memory and FLOPs that alignment needs with a latent reward and with pixel rewards."""
