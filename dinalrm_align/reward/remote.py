"""A reward that a server computes: `python -m dinalrm_align.serve`, in another environment or on another card.

    reward = load_reward("http://127.0.0.1:8000")               # the server's default reward
    reward = load_reward("dinalrm + 0.2*http://host:8000#judge")

Scores have no gradient: use this reward for GRPO, DPO, NFT and evaluation, not for ReFL. A server with a token needs
DINALRM_TOKEN in the client's environment too. A failed request is repeated up to `attempts` times; a request that the
server refuses, such as one without the token, is not. Then the run stops with its state saved, and can be resumed when
the server is back. A failure never becomes a score.

Prompts travel as strings, and the server encodes them; embeddings travel only if their prompts are unknown. Tensors
travel as safetensors in their own dtype.
"""

import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Unpack

import torch
from safetensors.torch import save
from torch import Tensor

from dinalrm_align.models.images import image_batches
from dinalrm_align.models.text import Conditions, prompts_of
from dinalrm_align.reward.http import Refused, Server
from dinalrm_align.reward.inputs import SEEDS, as_batch, check_seeds, check_sigma, draw_noise
from dinalrm_align.reward.origin import Origin
from dinalrm_align.reward.protocol import Latents, Noise, RewardModule, Seeds, Sigma, Text, finite_scores
from dinalrm_align.train.files import InputError, parse_json
from dinalrm_align.train.settings import did_you_mean

PROTOCOL = "dinalrm 1"
"""Value of `protocol` in the metadata of a request and in answers."""
TOKEN = "DINALRM_TOKEN"
"""Environment variable with the server's token."""


class RemoteReward(RewardModule):
    """A reward that a server computes, without gradient. Create one with `from_pretrained` or `load_reward`.

    The fingerprint is that of the served reward and of its image rewards' VAE. If the server was restarted with another
    reward, its answers have another fingerprint, and scoring raises InputError. A pickled reward holds the address, not
    the token.
    """

    differentiable = False

    def __init__(self, server: Server, name: str, facts: Mapping[str, Any]) -> None:
        """Create the reward `name` of a server. facts: what the server says about this reward."""
        super().__init__()
        self.server, self.name, self._facts = server, name, facts
        self.reads_noise, self.wants_groups = facts["reads_noise"], facts["wants_groups"]
        self.scores_images, self.sigmas = facts["scores_images"], facts.get("sigmas")
        self.eval()

    @classmethod
    def from_pretrained(cls, source: str, *, attempts: int = 10, **server: Any) -> "RemoteReward":
        """Ask a server which rewards it has, and return one of them. Waits for a server that is not up yet.

        Args:
            source: http://host:port#NAME; without #NAME, the server's default reward.
            attempts: maximum number of attempts per request; with the default pauses, 10 wait for 4
                minutes between attempts.
            server: other keyword arguments of `Server`; default of `api_key`: the environment variable DINALRM_TOKEN.
        """
        url, _, name = str(source).partition("#")
        asked = Server(url, attempts=attempts, **{"api_key": os.environ.get(TOKEN), **server})
        served = asked.request("/v1/rewards", None, lambda text: _answer(text, url)["rewards"])
        name = name or next(iter(served))
        if name not in served:
            known = f"{did_you_mean(name, served) or ';'} it serves {', '.join(served)}"
            raise ValueError(f"remote: got the name {name!r}, which {url} does not serve{known}")
        reward = cls(asked, name, served[name])
        reward.loaded_by(Origin(_from_origin, source, {"attempts": attempts, **server}, reward.fingerprint()))
        return reward

    def fingerprint(self) -> str:
        return self._facts["fingerprint"]

    def forward(self, latents: Latents, prompts: Text, **noise: Unpack[Noise]) -> Tensor:
        """Return scores (B,), float32, of scaled clean latents (B, C, h, w), on the latents' device.

        Arguments are as in `Reward.__call__`; a `generator` draws the noise here. Raises ConnectionError if the server
        does not answer, and InputError if the server refuses the request or has another reward.
        """
        latents = as_batch("latents", latents, torch.device("cpu"))
        self.check_gradient(latents)
        levels, drawn = _noise_tensors(latents, noise) if self.reads_noise else (None, {})
        return self._score({"latents": latents, **drawn}, prompts, levels).to(latents.device)

    def score_images(
        self, images: Any, prompts: Text, *, sigma: Sigma | None = None, generator: torch.Generator | None = None,
        seeds: Seeds | None = None, differentiable: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return scores (B,), float32, of images as `image_tensor` takes them, also of different sizes.

        A `generator` draws one seed per sample here. Raises the errors of `forward`, and ValueError if the reward
        scores no images or `differentiable` is true.
        """
        if not self.scores_images or differentiable:
            problem = "gives no gradient" if self.scores_images else "reads latents and cannot score images"
            raise ValueError(f"reward {self.name!r} of {self.server.url} {problem}")
        pixels = [image for batch in image_batches(images) for image in batch]
        text = prompts_of(prompts, len(pixels))
        if generator is not None:
            seeds = torch.randint(SEEDS, (len(pixels),), generator=generator, device=generator.device)
        levels, given = _level_tensors(sigma, seeds, len(pixels)) if self.reads_noise else (None, {})
        scores = torch.empty(len(pixels))
        for size in {image.shape for image in pixels}:
            rows = [row for row, image in enumerate(pixels) if image.shape == size]
            tensors = {"images": torch.stack([pixels[row] for row in rows])}
            tensors |= {name: tensor[rows] for name, tensor in given.items()}
            scores[rows] = self._score(tensors, [text[row] for row in rows], levels)
        return scores.to(pixels[0].device)

    def _score(self, tensors: Mapping[str, Tensor], prompts: Text, levels: Sequence[float] | None) -> Tensor:
        """Return scores (B,), on the CPU, of tensors whose first axis has the samples. Large batches are split."""
        count, strings = len(next(iter(tensors.values()))), None
        if isinstance(prompts, Conditions) and not any(prompts.prompts):
            embeds = dict(prompt_embeds=prompts.prompt_embeds, pooled_prompt_embeds=prompts.pooled_prompt_embeds)
            tensors = {**tensors, **embeds}
        else:
            strings = prompts_of(prompts, count)
        each = sum(tensor[:1].nbytes for tensor in tensors.values())
        fitting = max(1, min(self._facts["max_batch_size"], int(0.9 * self._facts["max_body_bytes"]) // each))
        size = count if self.wants_groups else fitting

        def ask(start: int) -> Tensor:
            part = slice(start, min(start + size, count))
            rows = {name: tensor[part].detach().cpu().contiguous() for name, tensor in tensors.items()}
            body = request_body(rows, strings and strings[part], levels)
            if len(body) > (limit := self._facts["max_body_bytes"]):
                got = f"{len(body)} bytes of {part.stop - start} samples; expected at most {limit}"
                raise ValueError(f"{self.server.url}: got {got}: start the server with a larger --max_body_mb")
            read = lambda text: self._scores(text, part.stop - start)  # noqa: E731
            path = f"/v1/score?reward={urllib.parse.quote(self.name, safe='')}"
            return self.server.request(path, body, read, "application/octet-stream")

        with ThreadPoolExecutor(self._facts["devices"]) as pool:  # with one device, requests go one after the other
            return torch.cat(list(pool.map(ask, range(0, count, size))))

    def _scores(self, text: str, count: int) -> Tensor:
        """Return the scores (count,), float32, of an answer. Raises an error unless they are of this reward."""
        where = f"{self.server.url}, reward {self.name!r}"
        found = _answer(text, where)
        if found.get("fingerprint") != self.fingerprint():
            got = f"got scores of another reward ({found.get('fingerprint')}; expected {self.fingerprint()})"
            raise Refused(f"{where}: {got}; start the server with the reward that the run began with")
        scores = found.get("scores")
        if not isinstance(scores, list) or not all(type(score) is float for score in scores):
            raise InputError(f"{where}: got {scores!r:.80}; expected {count} scores")
        return finite_scores(torch.tensor(scores, dtype=torch.float32), count, self.name)


def request_body(tensors: Mapping[str, Tensor], prompts: Sequence[str] | None, levels: Sequence[float] | None) -> bytes:
    """Return the body of POST /v1/score: safetensors, with prompts and the levels of an ensemble as JSON metadata.

    Args:
        tensors: `latents` (B, C, h, w) or `images` (B, 3, H, W); without prompts, also `prompt_embeds` (B, L, D) and
            `pooled_prompt_embeds` (B, P). Optional: `sigma` (B,); `seeds` (B,) or `noise`, (B, C, h, w), or
            (B, K, C, h, w) with one draw per level.
        levels: noise levels of an ensemble; None: none.
    """
    given = {"prompts": prompts, "levels": levels}
    metadata = {name: json.dumps(list(value)) for name, value in given.items() if value is not None}
    return save(dict(tensors), metadata | {"protocol": PROTOCOL})


def _level_tensors(
    sigma: Sigma | None, seeds: Seeds | None, count: int
) -> tuple[Sequence[float] | None, dict[str, Tensor]]:
    """Return the levels of an ensemble, or None, and the tensors of a request that set sigma and seeds."""
    tensors = {} if seeds is None else {"seeds": torch.tensor(check_seeds(seeds, count))}
    sigma = None if sigma is None else check_sigma(sigma, count)
    if sigma is None or isinstance(sigma, tuple):
        return sigma, tensors
    return None, {**tensors, "sigma": torch.as_tensor(sigma, dtype=torch.float32).expand(count)}


def _noise_tensors(latents: Tensor, given: Noise) -> tuple[Sequence[float] | None, dict[str, Tensor]]:
    """Return the levels of an ensemble, or None, and the tensors of a request that set the noise."""
    sigma, noise, generator, seeds = (given.get(name) for name in ("sigma", "noise", "generator", "seeds"))
    levels, tensors = _level_tensors(sigma, seeds, len(latents))
    if noise is not None or generator is not None:
        drawn = draw_noise(latents, noise, generator, seeds, len(levels or [0]))
        tensors["noise"] = drawn if drawn.dim() == 4 else drawn.transpose(0, 1)
    return levels, tensors


def _answer(text: str, where: str) -> dict[str, Any]:
    found = parse_json(text, where)
    if not isinstance(found, dict) or found.get("protocol") != PROTOCOL:
        raise InputError(f"{where}: got {text!r:.200}; expected an answer of python -m dinalrm_align.serve")
    return found


def _from_origin(source: str, *, device: str, **server: Any) -> RemoteReward:
    """Load a pickled reward. device: ignored."""
    return RemoteReward.from_pretrained(source, **server)
