"""What an alignment run costs with a latent reward and with a pixel one: counted without weights, measured on CUDA."""
