"""A tiny tokenizer of the Qwen2 and Qwen3 families, and images to score."""

from pathlib import Path

import numpy as np
from PIL import Image
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def save_tokenizer(path: Path) -> dict[str, int]:
    """Save a tokenizer of single bytes and the special tokens, 263 of them; return the token ids of a VL config."""
    characters = [*bytes_to_unicode().values(), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(characters)}, merges=[])
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.save_pretrained(path)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(SPECIAL[2:]), strict=True))


def smooth_images():
    """Smooth images, as photographs are: (height, width) 300 x 400 and 448 x 448."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for size in ((400, 300), (448, 448))
    ]
