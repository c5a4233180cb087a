"""Rewards over pixels with `LatentReward`'s call signature: latents are decoded once, then scored.

Their `from_pretrained` share these arguments:
    source: a folder, hub id or file of the weights.
    vae: decoder for latents; without one only images can be scored.
    device, dtype: of the model; default: the CPU, float32.
    revision, token, cache_dir, local_files_only: as in `huggingface_hub`; `revision` is that of `source`.
They raise ValueError if a weight is missing, unexpected or of another shape, or a file holds code; OSError for missing
files.
"""
