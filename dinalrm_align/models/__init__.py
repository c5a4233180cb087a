"""Find and load pretrained models, and prepare prompts and images for them."""
