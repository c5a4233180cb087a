"""Image rewards: they decode latents, score the images, and are called like `LatentReward`.

Arguments that all their `from_pretrained` share:
    source: folder, hub id or file of the weights.
    vae: decodes latents; without one only images can be scored.
    device, dtype: of the model; default: CPU, float32.
    revision, token, cache_dir, local_files_only: as in `huggingface_hub`; `revision` applies to `source` only.
They raise ValueError if a weight is missing, unexpected or of another shape, or if a file contains code, and OSError
for missing files.
"""
