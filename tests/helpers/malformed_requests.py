"""Malformed requests to the reward server: each must get its status and a sentence, never a score.

The server has the rewards `default`, a latent reward of 16 channels, and `latents`, a callable of latents. It takes at
most 1 MiB and 16 waiting samples.
"""

import base64
import io
import json
from dataclasses import dataclass, field

import torch
from PIL import Image
from safetensors.torch import save

from dinalrm_align.reward.remote import request_body

PROMPT = ["a small red circle on white"]
DRM = {"x-drm-protocol-version": "1"}


@dataclass(frozen=True)
class Request:
    """A POST request. names: words that the answer must hold, separated by blanks."""

    name: str
    path: str
    body: bytes
    status: int
    names: str
    headers: dict[str, str] = field(default_factory=dict)


def png(mode="RGB", size=(16, 16)) -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def huge_png() -> str:
    """The header of a PNG file of 60,000 x 60,000 pixels."""
    data = bytearray(base64.b64decode(png()))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    return base64.b64encode(bytes(data)).decode()


def own(prompts=PROMPT, levels=None, **tensors) -> bytes:
    tensors = {
        name: tensor
        for name, tensor in ({"latents": torch.randn(1, 16, 16, 16)} | tensors).items()
        if tensor is not None
    }
    return request_body(tensors, prompts, levels)


def drm(**changes) -> bytes:
    tensors = {
        "latents": torch.randn(1, 16, 16, 16), "prompt_embeds": torch.randn(1, 32, 32),
        "pooled_prompt_embeds": torch.randn(1, 32), "u": torch.tensor([0.4]),
    }  # fmt: skip
    return save({name: tensor for name, tensor in (tensors | changes).items() if tensor is not None})


def compute(**values) -> bytes:
    return json.dumps({"prompt": PROMPT, "image": [png()], **values}).encode()


def with_nan(*shape: int) -> torch.Tensor:
    tensor = torch.randn(shape)
    tensor.flatten()[0] = float("nan")
    return tensor


def requests() -> list[Request]:
    score, nan = "/v1/score", with_nan(1, 16, 16, 16)
    return [
        Request("empty", score, b"", 400, "body safetensors"),
        Request("not safetensors", score, b"\x80\x04K\x01.", 400, "body safetensors"),
        Request("cut off", score, own()[:-10], 400, "body safetensors"),
        Request("header too long", score, b"\xff" * 16, 400, "body safetensors"),
        Request("no protocol", score, save({"latents": torch.randn(1, 16, 16, 16)}), 400, "protocol None x-drm"),
        Request("too large", score, b"\0" * (2**20 + 1), 413, "body 1048576"),
        Request("no tensors", score, own(latents=None), 400, "tensors none latents"),
        Request("unknown tensor", score, own(reward=torch.ones(1)), 400, "tensors reward"),
        Request("no prompts", score, own(prompts=None), 400, "tensors prompt_embeds"),
        Request("prompts of another number", score, own(prompts=PROMPT * 2), 400, "samples latents prompts"),
        Request("a prompt that is no string", score, own(prompts=[3]), 400, "prompts[0]"),
        Request("latents NaN", score, own(latents=nan), 400, "latents NaN"),
        Request("latents of 3 axes", score, own(latents=torch.randn(16, 16, 16)), 400, "latents (16, axes"),
        Request("latents of 5 channels", score, own(latents=torch.randn(1, 5, 16, 16)), 400, "latents 5 channels"),
        Request("latents of odd height", score, own(latents=torch.randn(1, 16, 15, 16)), 400, "latents 15"),
        Request("integer latents", score, own(latents=torch.ones(1, 16, 16, 16, dtype=torch.int32)), 400, "int32"),
        Request("no samples", score, own(prompts=[], latents=torch.randn(0, 16, 16, 16)), 400, "prompts none"),
        Request("sigma of 2", score, own(sigma=torch.tensor([2.0])), 400, "sigma 2"),
        Request("sigma NaN", score, own(sigma=torch.tensor([float("nan")])), 400, "sigma NaN"),
        Request("seed under 0", score, own(seeds=torch.tensor([-1])), 400, "seeds -1"),
        Request("seeds of floats", score, own(seeds=torch.tensor([1.0])), 400, "seeds float32"),
        Request("seeds and noise", score, own(seeds=torch.tensor([1]), noise=torch.randn(1, 16, 16, 16)), 400, "seeds noise"),
        Request("noise of another size", score, own(noise=torch.randn(1, 16, 8, 8)), 400, "noise (1, 16, 8, 8)"),
        Request("levels of text", score, own(levels=["a"]), 400, "sigma 'a'"),
        Request("65 levels", score, own(levels=[0.4] * 65), 400, "levels 64"),
        Request("levels and sigma", score, own(levels=[0.4], sigma=torch.tensor([0.4])), 400, "levels sigma"),
        Request("embeddings of another length", score, own(prompts=None, prompt_embeds=torch.randn(1, 42, 32), pooled_prompt_embeds=torch.randn(1, 32)), 400, "prompt_embeds 42 32 max_sequence_length"),
        Request("too many samples", score, own(latents=torch.randn(17, 16, 4, 4), prompts=PROMPT * 17), 413, "17 16"),
        Request("images for a reward of latents", score + "?reward=latents", own(latents=None, images=torch.rand(1, 3, 8, 8)), 400, "images"),
        Request("images over 1", score, own(latents=None, images=2 * torch.ones(1, 3, 16, 16)), 400, "images [0, 1]"),
        Request("unknown reward", score + "?reward=defualt", own(), 404, "'defualt' default"),
        Request("wrong version", score, drm(), 400, "x-drm-protocol-version '2' '1'", {"x-drm-protocol-version": "2"}),
        Request("DRM without u", score, drm(u=None), 400, "tensors u", DRM),
        Request("DRM without embeddings", score, drm(prompt_embeds=None), 400, "tensors prompt_embeds", DRM),
        Request("DRM, embeddings NaN", score, drm(prompt_embeds=with_nan(1, 32, 32)), 400, "prompt_embeds NaN", DRM),
        Request("DRM, embeddings of another width", score, drm(prompt_embeds=torch.randn(1, 32, 8)), 400, "prompt_embeds 8", DRM),
        Request("DRM, embeddings of another length", score, drm(prompt_embeds=torch.randn(1, 42, 32)), 400, "prompt_embeds 42 32 max_sequence_length", DRM),
        Request("DRM, u of 1.5", score, drm(u=torch.tensor([1.5])), 400, "1.5", DRM),
        Request("DRM for a reward without raw scores", score + "?reward=latents", drm(), 400, "latent reward", DRM),
        Request("compute: not JSON", "/compute", b"{", 400, "body JSON"),
        Request("compute: a list", "/compute", b"[]", 400, "body list"),
        Request("compute: no images", "/compute", compute(image=None), 400, "image None"),
        Request("compute: video", "/compute", compute(video=[[png()]]), 400, "video"),
        Request("compute: no prompts", "/compute", compute(prompt=[]), 400, "prompts none"),
        Request("compute: one prompt for two images", "/compute", compute(image=[png(), png()]), 400, "image 1"),
        Request("compute: not base64", "/compute", compute(image=["%%%"]), 400, "image[0] %%% PNG"),
        Request("compute: not PNG", "/compute", compute(image=[base64.b64encode(b"GIF89a").decode()]), 400, "image[0] PNG"),
        Request("compute: damaged PNG", "/compute", compute(image=[png()[:60]]), 400, "image[0]"),
        Request("compute: too many images, not decoded", "/compute", compute(prompt=PROMPT * 17, image=["%%%"] * 17), 400, "17 16"),
        Request("compute: too many pixels", "/compute", compute(prompt=PROMPT * 5, image=[png("1", (4096, 4096))] * 5), 400, "image 83886080 67108864"),
        Request("compute: huge PNG", "/compute", compute(image=[huge_png()]), 400, "image[0]"),
    ]  # fmt: skip
