"""Scores of saved LoRAs without guidance, for the prompts and the noise of a run's own evaluations."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dinalrm_align.eval.report.entries import Run
from dinalrm_align.eval.report.parts import PREFIX
from dinalrm_align.models.specs import resolve_model
from dinalrm_align.train.files import file_digest, read_json, write_atomically

UNGUIDED = 1.0
"""Guidance scale at which the velocity is that of the prompt alone."""


class Unguided:
    """Samples and scores LoRAs. `run`: the run whose evaluation gives prompts, noise and steps.

    Results are kept in OUT/unguided/NAME_SCALE.json; NAME is the LoRA's run, or base for the model without a LoRA. They
    are computed again if the LoRA's weights, the evaluation or gold have changed.
    """

    def __init__(self, out: Path, run: Run) -> None:
        self.out, self.run = out / "unguided", run

    def scores(self, lora: Path | None, guidance_scale: float = UNGUIDED) -> dict[str, np.ndarray]:
        """Return gold and its parts of every sample, each (N,). lora: folder of a run's LoRA; None: the base model."""
        path = self.out / f"{lora.parent.name if lora else 'base'}_{guidance_scale:g}.json"
        weights = {file.name: file_digest(file) for file in sorted(lora.glob("*.safetensors"))} if lora else {}
        made_from = json.loads(json.dumps({"terms": self.run.terms, "lora": weights}))
        if path.is_file() and (found := read_json(path)).get("made_from") == made_from:
            return {name: np.array(values) for name, values in found["scores"].items()}
        scores = self.sample(lora, guidance_scale)
        write_atomically(path, json.dumps({"made_from": made_from, "scores": scores}))
        return {name: np.array(values) for name, values in scores.items()}

    @cached_property
    def models(self) -> tuple[Any, Any, Any]:
        """The pipeline, the gold reward and the model's description."""
        import torch
        from diffusers import StableDiffusion3Pipeline

        from dinalrm_align.reward.names import gold_rewards
        from dinalrm_align.reward.registry import load_image_scorer

        spec = resolve_model(self.run.settings["model"])[0].with_text_length(self.run.settings["text_length"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = StableDiffusion3Pipeline.from_pretrained(spec.pipeline).to(device)
        pipeline.set_progress_bar_config(disable=True)
        gold = gold_rewards(self.run.settings["gold"], spec.gold)["gold"]
        return pipeline, load_image_scorer(gold, spec=spec, device=device), spec

    def sample(self, lora: Path | None, guidance_scale: float) -> dict[str, list[float]]:
        import torch

        from dinalrm_align.flow.noise import seeded_generator
        from dinalrm_align.flow.sampling import seeded_noise
        from dinalrm_align.models.pipeline import decode_latents

        pipeline, scorer, spec = self.models
        terms, found = self.run.terms, {}
        if lora:
            pipeline.load_lora_weights(lora)
        size = int(self.run.settings["evaluation.batch_size"])
        print(f"without guidance: {lora.parent.name if lora else 'the base model'}", flush=True)
        for start in range(0, len(terms["prompts"]), size):
            prompts = terms["prompts"][start : start + size]
            generators = [seeded_generator(terms["seed"], start + index) for index in range(len(prompts))]
            with torch.no_grad():
                latents = pipeline(
                    prompts, negative_prompt=[""] * len(prompts), num_inference_steps=len(terms["sigmas"]) - 1,
                    guidance_scale=guidance_scale, max_sequence_length=spec.text_length, height=spec.height,
                    width=spec.width, latents=seeded_noise(tuple(terms["latent_shape"]), generators),
                    output_type="latent",
                ).images  # fmt: skip
                gold, parts = scorer.with_parts(decode_latents(pipeline.vae, latents), prompts)
            for name, values in {"gold": gold, **{f"{PREFIX}{part}": one for part, one in parts.items()}}.items():
                found.setdefault(name, []).extend(values.tolist())
        if lora:
            pipeline.unload_lora_weights()
        return found
