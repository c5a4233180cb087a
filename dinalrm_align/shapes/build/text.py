"""The text encoders: each T5 token, the last token of each CLIP tower and the pooled embedding predict the caption's
content. This replaces the web-scale pretraining of SD3's encoders.
"""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from dinalrm_align.shapes.build.stage import run_stage
from dinalrm_align.shapes.config import BuildConfig
from dinalrm_align.shapes.scene import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, draw_scenes

SLOT_CLASSES = [4, *[len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1] * 3, len(RELATIONS) + 1, len(BACKGROUNDS) + 1]
"""Classes per slot of a caption, see `_slots`; class 0 is "none"."""


def _slots(scene: Scene | None) -> list[int]:
    """Content of a caption, one class per slot: number of items; shape, colour, size of each; relation; background."""
    if scene is None:
        return [0] * len(SLOT_CLASSES)
    slots = [len(scene.items)]
    for item in (*scene.items, *[None] * (3 - len(scene.items))):
        values = ((SHAPES, "shape"), (tuple(COLOURS), "colour"), (SIZES, "size"))
        slots += [names.index(vars(item)[kind]) + 1 if item else 0 for names, kind in values]
    slots.append(list(RELATIONS).index(scene.relation) + 1 if scene.relation else 0)
    return [*slots, list(BACKGROUNDS).index(scene.background) + 1]


def train_text(pipeline: StableDiffusion3Pipeline, config: BuildConfig, accelerator: Accelerator) -> None:
    """Train the three text encoders in place."""
    stage, stack, length = config.text, config.stack, config.stack.text_length
    towers = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads = nn.ModuleList(
            [nn.Linear(width, sum(SLOT_CLASSES)) for width in (2 * stack.clip_width,) * 2 + (stack.t5_width,)]
        )
    parts = nn.ModuleList([*towers, heads]).to(accelerator.device)

    def batch_at(step: int) -> list[Scene | None]:
        return [*draw_scenes(stage.batch_size - 1, np.random.default_rng((config.seed + 2, step))), None]

    def step(scenes: list[Scene | None]) -> tuple[Tensor, dict[str, float]]:
        captions = [scene.caption if scene else "" for scene in scenes]
        target = torch.tensor([_slots(scene) for scene in scenes], device=accelerator.device)
        ids = [
            tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            for tokenizer in tokenizers
        ]
        ids = [tensor.to(accelerator.device) for tensor in ids]
        clips = [tower(tokens, output_hidden_states=True) for tower, tokens in zip(towers[:2], ids[:2])]
        pooled = torch.cat([out.text_embeds for out in clips], -1)
        last = torch.cat([out.hidden_states[-2][:, -1] for out in clips], -1)
        every = towers[2](ids[2]).last_hidden_state
        losses = {
            "pooled": _slot_loss(heads[0](pooled), target),
            "clip": _slot_loss(heads[1](last), target),
            "t5": _slot_loss(heads[2](every), target[:, None].expand(-1, length, -1)),
        }
        return sum(losses.values()), {name: loss.item() for name, loss in losses.items()}

    parts.requires_grad_(True)
    run_stage("text", stage, config, accelerator, dict(parts.named_parameters()), batch_at, step)
    parts.requires_grad_(False)


def _slot_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over slots: logits (..., sum of SLOT_CLASSES), target (..., slots)."""
    losses = [
        F.cross_entropy(part.flatten(0, -2), target[..., slot].flatten())
        for slot, part in enumerate(logits.split(SLOT_CLASSES, -1))
    ]
    return sum(losses) / len(losses)
