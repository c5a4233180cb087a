"""What clients send: three protocols, each read into `Job`s. Malformed requests raise ValueError or TypeError.

own             POST /v1/score: safetensors as `reward.remote.request_body` writes them
DRM 1           POST /v1/score with the header x-drm-protocol-version: 1: safetensors of one sample, as verl-omni's
                client for latent rewards (DRM) sends them (verl_omni/utils/reward_score/latent_http_scorer_client.py,
                commit a1139ba)
Flow-Factory    POST /compute: JSON with PNG images in base64 (src/flow_factory/rewards/my_reward_remote.py, a0b2bc5)
"""

import base64
import binascii
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from dinalrm_align.models.images import image_size, open_image
from dinalrm_align.models.text import Conditions, check_prompts
from dinalrm_align.reward.inputs import FLOATING, check_finite
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.reward.remote import PROTOCOL
from dinalrm_align.train.files import parse_json

DRM_HEADER, DRM_VERSION = "x-drm-protocol-version", "1"
MOST_PIXELS = 8192 * 8192
"""Largest number of pixels of all PNG images of a request: a few kilobytes of PNG may hold millions."""
MOST_LEVELS = 64
"""Largest number of levels of an ensemble in a request: each level is a pass through the backbone."""
DIMS = {
    "latents": (4,), "images": (4,), "noise": (4, 5), "prompt_embeds": (3,), "pooled_prompt_embeds": (2,),
    "sigma": (1,), "u": (1,), "seeds": (1,),
}  # fmt: skip
"""Numbers of axes of the tensors of a request; the first axis has the samples. For shapes, see `request_body`."""
DTYPES = {"seeds": (torch.int64,), "images": (*FLOATING, torch.uint8)}
"""Dtypes of tensors; of all others: `FLOATING`."""


@dataclass(frozen=True)
class Job:
    """Samples that are scored together.

    Args:
        tensors: name in `DIMS` -> tensor.
        prompts: one string per sample; None if `tensors` has embeddings.
        levels: noise levels of an ensemble; None: none.
        raw: whether to return a latent reward's scores before score_scale and score_bias.
        arrived: time of arrival, of time.monotonic().
    """

    tensors: Mapping[str, Tensor]
    prompts: Sequence[str] | None
    levels: tuple[float, ...] | None = None
    raw: bool = False
    arrived: float = field(default_factory=time.monotonic)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def key(self) -> tuple[Any, ...]:
        """Jobs with equal keys can be joined."""
        tensors = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in sorted(self.tensors.items()))
        return tensors, self.prompts is None, self.levels, self.raw


def joined(jobs: Sequence[Job]) -> Job:
    """Return the samples of jobs with equal keys as one job."""
    first = jobs[0]
    tensors = {name: torch.cat([job.tensors[name] for job in jobs]) for name in first.tensors}
    prompts = None if first.prompts is None else [prompt for job in jobs for prompt in job.prompts or ()]
    return Job(tensors, prompts, first.levels, first.raw, first.arrived)


@torch.no_grad()
def score_job(reward: Reward, job: Job) -> list[float]:
    """Return the score of each sample. Raises ValueError if the reward cannot score what the job has."""
    given: dict[str, Any] = {name: tensor.to(reward.device) for name, tensor in job.tensors.items()}
    prompts = job.prompts
    if prompts is None:
        for part in reward.noise_parts:
            want = part.encoder.clip_tokens + (length := part.config.text_length)
            if (got := given["prompt_embeds"].shape[1]) != want:
                raise ValueError(f"prompt_embeds: got {got} tokens; expected {want}: max_sequence_length={length}")
        prompts = Conditions([""] * len(job), given.pop("prompt_embeds"), given.pop("pooled_prompt_embeds"))
    else:  # one by one, so that the embeddings of a prompt, to the last bit, do not depend on other requests
        for part, prompt in product(reward.noise_parts, dict.fromkeys(prompts)):
            part.encoder([prompt])
    if job.levels is not None:
        given["sigma"] = job.levels
    if "images" in given:
        if not reward.scores_images:
            raise ValueError(f"images: the reward {reward.name!r} reads latents and cannot score images")
        return reward.score_images(given.pop("images"), prompts, **given).tolist()
    latents = given.pop("latents")
    if "noise" in given and given["noise"].dim() == 5:
        given["noise"] = given["noise"].transpose(0, 1)
    if not job.raw:
        return reward(latents, prompts, **given).tolist()
    if len(reward.noise_parts) != 1 or len(reward.named_parts) != 1:
        raise ValueError(f"{DRM_HEADER}: the reward {reward.name!r} is not a latent reward; use another protocol")
    return reward.noise_parts[0].raw(latents, prompts, **given).tolist()


def read_own(body: bytes) -> list[Job]:
    tensors, metadata = _tensors(body)
    if metadata.get("protocol") != PROTOCOL:
        got = f"got {metadata.get('protocol')!r:.80} in the metadata, and no header {DRM_HEADER}"
        raise ValueError(f"protocol: {got}; expected {PROTOCOL!r}, or the header with version {DRM_VERSION}")
    prompts, levels = (parse_json(metadata.get(name, "null"), name) for name in ("prompts", "levels"))
    needed = {"images" if "images" in tensors else "latents"}
    optional = {"seeds", "sigma"} if "images" in tensors else {"seeds", "noise", "sigma"}
    _check(tensors, needed, optional, None if prompts is None else check_prompts(prompts))
    if levels is not None and not (isinstance(levels, list) and len(levels) <= MOST_LEVELS):
        raise ValueError(f"levels: got {levels!r:.80}; expected a list of at most {MOST_LEVELS} numbers")
    if levels is not None and "sigma" in tensors:
        raise ValueError("got both levels and sigma; pass one of them")
    return [Job(tensors, prompts, None if levels is None else tuple(levels))]


def read_drm(body: bytes, version: str) -> list[Job]:
    """Read a request of verl-omni. Without `seeds`, the noise is that of seed 0."""
    if version != DRM_VERSION:
        raise ValueError(f"{DRM_HEADER}: got {version!r:.40}; expected {DRM_VERSION!r}")
    tensors, _ = _tensors(body)
    _check(tensors, {"latents", "u"}, {"seeds"}, None)
    tensors["sigma"] = tensors.pop("u")
    return [Job(tensors, None, raw=True)]


def read_compute(body: bytes, most: int) -> list[Job]:
    """Read a request of Flow-Factory: one job per image, uint8. Decodes at most `most` images."""
    found = parse_json(body.decode("utf-8", errors="replace"), "body")
    if not isinstance(found, dict):
        raise ValueError(f"body: got a JSON {type(found).__name__}; expected an object with prompt and image")
    if others := [name for name, value in found.items() if name not in ("prompt", "image") and value is not None]:
        raise ValueError(f"{others[0]:.40}: is not supported; expected prompt and image")
    prompts, images = check_prompts(found.get("prompt")), found.get("image")
    if not isinstance(images, list) or len(images) != len(prompts):
        raise ValueError(f"image: got {images!r:.40}; expected a list of {len(prompts)}, one per prompt")
    if len(images) > most:
        raise ValueError(f"got {len(images)} samples; expected at most max_queue, {most}")
    names = [f"image[{i}]" for i in range(len(images))]
    files = list(map(_png, names, images))
    if (total := sum(height * width for height, width in map(image_size, files, names))) > MOST_PIXELS:
        raise ValueError(f"image: got {total} pixels; expected at most {MOST_PIXELS} in a request: send fewer images")
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in map(open_image, files, names)]
    return [Job({"images": image}, [prompt]) for image, prompt in zip(pixels, prompts, strict=True)]


def _png(name: str, text: object) -> bytes:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        data = b""
    if not data.startswith(b"\x89PNG\r\n"):
        raise ValueError(f"{name}: got {text!r:.40}; expected a PNG file in base64")
    return data


def _tensors(body: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of safetensors."""
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"body: got {len(body)} bytes that are not safetensors ({error!s:.120})") from error
    header = parse_json(body[8 : 8 + int.from_bytes(body[:8], "little")].decode(errors="replace"), "header")
    return tensors, header.get("__metadata__") or {}


def _check(tensors: Mapping[str, Tensor], needed: set[str], optional: set[str], prompts: list[str] | None) -> None:
    """Raise ValueError unless the tensors are those needed, and embeddings if there are no prompts."""
    needed = needed | ({"prompt_embeds", "pooled_prompt_embeds"} if prompts is None else set())
    if not needed <= tensors.keys() <= needed | optional:
        got = f"{', '.join(sorted(tensors)) or 'none'}{' and' if prompts else ' without'} prompts"
        expected = f"{', '.join(sorted(needed))}; optional: {', '.join(sorted(optional))}"
        raise ValueError(f"tensors: got {got}; expected {expected}")
    for name, tensor in tensors.items():
        dtypes = DTYPES.get(name, FLOATING)
        if tensor.dim() not in DIMS[name] or tensor.dtype not in dtypes:
            expected = f"{' or '.join(map(str, DIMS[name]))} axes, dtype {' or '.join(map(str, dtypes))}"
            raise ValueError(f"{name}: got {tuple(tensor.shape)} of {tensor.dtype}; expected {expected}")
        if tensor.is_floating_point():
            check_finite(name, tensor)
    counts = {name: len(tensor) for name, tensor in tensors.items()} | ({"prompts": len(prompts)} if prompts else {})
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"samples: got {counts}; expected the same number of each, at least 1")
