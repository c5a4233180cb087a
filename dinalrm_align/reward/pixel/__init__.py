"""Rewards that score images. Each decodes latents with a VAE and is called like `LatentReward`.

Arguments shared by every `from_pretrained` that loads weights:
    source: folder, hub id or file of the weights.
    vae: VAE that decodes latents; None if the reward will only score images.
    device, dtype: device and data type of the reward model; default: CPU, float32 (HPSv3: bfloat16).
    revision, token, cache_dir, local_files_only: as in `huggingface_hub`; `revision` applies to `source` only.

Loading raises OSError if a file is missing. It raises ValueError if a file contains code, or if a weight is missing,
unexpected or of another shape.
"""
