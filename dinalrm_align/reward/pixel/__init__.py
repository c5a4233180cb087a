"""Rewards that score images. They can be called with latents, like a `LatentReward`; a VAE then decodes the latents.

Arguments shared by every `from_pretrained` that loads weights:
    source: folder, hub id or file of the weights.
    vae: VAE that decodes latents; None if the reward will only score images.
    device, dtype: device and data type of the reward model; default: CPU, float32 (HPSv3, HPSv3++: bfloat16).
    revision, token, cache_dir, local_files_only: as in `huggingface_hub`. `revision` is used for `source` only.

Loading raises OSError if a file is missing. Loading raises ValueError if a weights file contains code, or if a tensor
is missing, unexpected or of the wrong shape.
"""
