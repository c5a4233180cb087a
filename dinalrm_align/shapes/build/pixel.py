"""The pixel reward: a CLIP model on decoded images with PickScore's likelihood (arXiv 2305.01569)."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.models.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from dinalrm_align.models.vae import decode_latents
from dinalrm_align.shapes.build.stage import run_stage
from dinalrm_align.shapes.config import BuildConfig
from dinalrm_align.train.files import write_atomically


def train_pixel(
    pipeline: StableDiffusion3Pipeline, pairs: LatentPairs, config: BuildConfig, accelerator: Accelerator
) -> CLIPModel:
    """Train a CLIP reward on the decoded images of the pairs; its text tower is initialised from the pipeline's."""
    stage, size = config.pixel, config.stack.image_size
    text = pipeline.text_encoder.config.to_dict()
    text.pop("_name_or_path", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        clip = CLIPModel(
            CLIPConfig(
                text_config=text, projection_dim=text["projection_dim"], logit_scale_init_value=math.log(10.0),
                vision_config=dict(
                    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                    image_size=size, patch_size=8, hidden_act="gelu",
                ),
            )
        )  # fmt: skip
    clip.text_model.load_state_dict(pipeline.text_encoder.text_model.state_dict())
    clip.text_projection.load_state_dict(pipeline.text_encoder.text_projection.state_dict())
    clip.to(accelerator.device).train()
    preprocess = Preprocess(size, (size, size), CLIP_MEAN, CLIP_STD)

    def batch_at(step: int) -> tuple[PairBatch, Tensor]:
        batch = pairs.batch_at(step).to(accelerator.device)
        with torch.no_grad():
            return batch, preprocess(decode_latents(pipeline.vae, batch.latents))

    def step(item: tuple[PairBatch, Tensor]) -> tuple[Tensor, dict[str, float]]:
        batch, pixel_values = item
        tokens = pipeline.tokenizer(
            list(batch.group_prompts), padding="max_length", truncation=True, return_tensors="pt"
        )
        text = F.normalize(
            clip.get_text_features(input_ids=tokens.input_ids.to(accelerator.device)).pooler_output, dim=-1
        )
        image = F.normalize(clip.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)
        scores = clip.logit_scale.exp() * (image * text[batch.group]).sum(-1)
        gap = scores[batch.chosen] - scores[batch.rejected]
        return -F.logsigmoid(gap).mean(), {"accuracy": (gap > 0).float().mean().item()}

    parameters = dict(clip.named_parameters())
    run_stage("pixel", stage, config, accelerator, parameters, batch_at, step, shown=("loss", "accuracy"))
    return clip.requires_grad_(False).eval()


def save_clip_reward(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a folder in PickScore's layout: model, tokenizer, preprocessor_config.json."""
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = clip.config.vision_config.image_size
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }  # fmt: skip
    write_atomically(folder / "preprocessor_config.json", json.dumps(preprocessor, indent=1))
