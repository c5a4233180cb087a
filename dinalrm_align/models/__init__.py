"""Pretrained models: finding and loading their weights, and preparing prompts and images for them."""
