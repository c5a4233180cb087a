"""Memory and FLOPs of alignment with latent and with pixel rewards: counted without weights, or measured on CUDA."""
