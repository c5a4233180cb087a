"""Prompt files, captioned images, and the order of prompts."""

import pytest
from PIL import Image

from dinalrm_align.data.prompts import prompt_indices, read_captioned_images, read_prompts


def test_prompts_are_the_lines_that_are_not_blank(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n  ein Bär  \n# not a comment\n".encode())
    assert read_prompts(path) == ["a cat", "ein Bär", "# not a comment"]


def test_bad_prompt_files_are_refused_with_a_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*absent.txt"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        read_prompts(tmp_path)
    path = tmp_path / "prompts.txt"
    path.write_text("\n  \n")
    with pytest.raises(ValueError, match="is empty"):
        read_prompts(path)
    path.write_bytes("fine\nBär".encode("latin-1"))
    with pytest.raises(ValueError, match=r"is not UTF-8 \(line 2\)"):
        read_prompts(path)


def test_captioned_images_come_in_pairs(tmp_path):
    with pytest.raises(ValueError, match="^no images in"):
        read_captioned_images(tmp_path)
    for name in ("b", "a"):
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"image {name}\n")
    images, captions = read_captioned_images(tmp_path)
    assert captions == ["image a", "image b"]
    assert [image.mode for image in images] == ["RGB", "RGB"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*a.txt"):
        read_captioned_images(tmp_path)


def test_every_prompt_comes_once_per_epoch_over_all_ranks():
    """10 prompts, 2 processes x 3 a micro-step: 5 micro-steps are 30 = 3 rounds."""
    taken = [
        index
        for micro_step in range(5)
        for rank in range(2)
        for index in prompt_indices(10, 3, micro_step, seed=1, rank=rank, num_processes=2)
    ]
    rounds = [taken[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(one) == list(range(10)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_the_order_depends_on_the_seed_alone():
    first = prompt_indices(100, 8, 5, seed=1)
    assert prompt_indices(100, 8, 5, seed=1) == first
    assert prompt_indices(100, 8, 5, seed=2) != first


def test_a_batch_larger_than_the_list_wraps_around():
    assert sorted(prompt_indices(3, 6, 0, seed=0)) == [0, 0, 1, 1, 2, 2]
