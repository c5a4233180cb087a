"""Grids of images as PNG files; strips keep their images bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinalrm_align.models.grids import load_strip, save_before_after, save_grid, save_strip
from dinalrm_align.models.images import to_bytes


def is_image(path: Path) -> bool:
    with Image.open(path) as image:
        return image.size[0] > 100 and len(set(image.convert("L").getdata())) > 2


def test_a_strip_gives_its_images_back(tmp_path):
    tensor = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    images = to_bytes(tensor)
    assert images.shape == (3, 8, 6, 3)
    np.testing.assert_array_equal(images[1, 2, 3], (tensor[1, :, 2, 3] * 255).round().to(torch.uint8).numpy())
    save_strip(images, tmp_path / "strip.png")
    np.testing.assert_array_equal(load_strip(tmp_path / "strip.png", 3), images)


def test_a_strip_that_cannot_be_read_is_an_error_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="row of 2 images cannot be had from .*absent.png"):
        load_strip(tmp_path / "absent.png", 2)
    (tmp_path / "torn.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="torn.png"):
        load_strip(tmp_path / "torn.png", 2)
    save_strip(np.zeros((3, 4, 4, 3), dtype=np.uint8), tmp_path / "three.png")
    with pytest.raises(ValueError, match="three.png"):
        load_strip(tmp_path / "three.png", 5)


def test_grids_are_written(tmp_path):
    images = torch.rand(5, 3, 16, 16)
    captions = [
        "a red circle",
        "a prompt so long that it has to be wrapped and in the end cut short " * 3,
        "",
        "$x_$",
        "e",
    ]
    save_grid(images, captions, tmp_path / "deep" / "grid.png", columns=4, title="update 0")
    pixels = to_bytes(images)
    save_before_after(pixels, pixels[::-1], captions, tmp_path / "both.png")
    assert is_image(tmp_path / "deep" / "grid.png") and is_image(tmp_path / "both.png")
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "both.png"}
    with pytest.raises(ValueError, match="got 5 .*, 4 captions"):
        save_grid(images, captions[:4], tmp_path / "grid.png")
