import pytest
import torch

from dinalrm_align.shapes.config import StackConfig
from dinalrm_align.shapes.scene import caption_words
from dinalrm_align.shapes.stack import build_pipeline, clip_tokenizer, t5_tokenizer

CAPTION = "a large striped red circle left of a small outlined blue square on gray"


def test_every_caption_word_is_one_token_and_other_text_falls_back_to_letters():
    words = caption_words()
    clip, t5 = clip_tokenizer(words, 16), t5_tokenizer(words, 16)
    for word in words:
        assert len(clip.tokenize(word)) == len(t5.tokenize(word)) == 1
    assert len(clip.tokenize(CAPTION)) == len(t5.tokenize(CAPTION)) == 14
    assert clip.tokenize("hat") == ["h", "a", "t</w>"]
    assert t5.unk_token_id not in t5("zebra").input_ids


def test_the_longest_caption_fits_the_default_length_with_start_and_end():
    pipeline = build_pipeline(StackConfig.tiny())
    tokenizers = pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3
    assert [len(tokenizer(CAPTION).input_ids) for tokenizer in tokenizers] == [16, 16, 15]
    assert {tokenizer.model_max_length for tokenizer in tokenizers} == {StackConfig().text_length} == {16}


def test_a_saved_pipeline_loads_to_the_same_images(tmp_path):
    pipeline = build_pipeline(StackConfig.tiny(), seed=1)
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    again = type(pipeline).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    latents = [
        model(
            CAPTION, num_inference_steps=2, height=64, width=64, max_sequence_length=16, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
        for model in (pipeline, again)
    ]  # fmt: skip
    assert latents[0].shape == (1, 16, 16, 16)
    assert torch.equal(*latents)


def test_weights_depend_on_the_seed_alone():
    first, again, other = (build_pipeline(StackConfig.tiny(), seed=seed).transformer for seed in (0, 0, 1))
    weight = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_clip_widths_must_make_the_t5_width():
    with pytest.raises(ValueError, match="^stack.t5_width: got 96"):
        StackConfig(t5_width=96)
