"""Compare memory and FLOPs of alignment with latent and pixel rewards, counted without weights or measured on a GPU."""
