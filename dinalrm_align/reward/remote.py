"""A reward that a server computes: `python -m dinalrm_align.serve`, in another environment or on another card.

    reward = load_reward("http://127.0.0.1:8000")               # the server's first reward
    reward = load_reward("dinalrm + 0.2*http://host:8000#judge")

Scores have no gradient: use this reward for GRPO, DPO, NFT and evaluation, not for ReFL. A failed request is repeated;
then the run stops with its state saved, and resumes once the server is back. A failure never becomes a score.

Prompts travel as strings, and the server encodes them; embeddings travel only if their prompts are unknown. Tensors
travel as safetensors, in their own dtype, so a score equals the score of the same reward in this process.
"""

import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from safetensors.torch import save
from torch import Tensor

from dinalrm_align.models.images import image_batches
from dinalrm_align.models.text import Conditions, prompts_of
from dinalrm_align.reward.http import check_address, repeated, send
from dinalrm_align.reward.inputs import SEEDS, as_batch, check_seeds, check_sigma, draw_noise
from dinalrm_align.reward.origin import Origin
from dinalrm_align.reward.protocol import ImageOptions, Latents, Noise, RewardModule, Seeds, Sigma, Text, finite_scores
from dinalrm_align.train.files import InputError, parse_json
from dinalrm_align.train.settings import check_integer, check_number, did_you_mean

PROTOCOL = "dinalrm 1"
"""Value of `protocol` in the metadata of a request and in answers."""
TOKEN = "DINALRM_TOKEN"
"""Environment variable with the token of the server."""
ADDRESS = "http://host:port, or http://host:port#NAME for one of its rewards"
ANSWER_LIMIT = 4 * 2**20


@dataclass(frozen=True)
class Endpoint:
    """Address of a server, and how often to ask it.

    Args:
        url: address of the server, http://host:port.
        token: bearer token; default: the environment variable DINALRM_TOKEN. None: no token.
        timeout: seconds without data after which an attempt fails.
        attempts: maximum number of attempts per request; with the default pause, 10 attempts take about 4 minutes.
        pause: seconds to wait after the first failed attempt; the wait doubles after each later failure, up to 60.
    """

    url: str
    token: str | None = field(default_factory=lambda: os.environ.get(TOKEN), repr=False)
    timeout: float = 120.0
    attempts: int = 10
    pause: float = 1.0

    def __post_init__(self) -> None:
        check_address("remote", self.url, ADDRESS)
        if "@" in urllib.parse.urlsplit(self.url).netloc:
            raise ValueError(f"remote: got a password in the address; pass the token in the variable {TOKEN} instead")
        check_number("timeout", self.timeout, low=1e-3)
        check_integer("attempts", self.attempts, low=1, high=100)
        check_number("pause", self.pause, low=0)

    def ask(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        """Return the JSON object that the server answers. Raises ConnectionError or InputError if there is none."""
        url = self.url.rstrip("/") + path
        headers = {"Content-Type": "application/octet-stream"}
        headers |= {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

        def attempt() -> dict[str, Any]:
            data = send(url, body, headers, timeout=self.timeout, limit=ANSWER_LIMIT)
            found = parse_json(data.decode(errors="replace"), url)
            if not isinstance(found, dict) or found.get("protocol") != PROTOCOL:
                raise InputError(f"{url}: got {found!r:.200}; expected an answer of python -m dinalrm_align.serve")
            return found

        return repeated(attempt, url, attempts=self.attempts, pause=self.pause, timeout=self.timeout)


class RemoteReward(RewardModule):
    """A reward that a server computes, without gradient. Create one with `from_pretrained` or `load_reward`.

    The reward has the fingerprint of the server's. A server that answers with another fingerprint, because it was
    started with another reward meanwhile, raises InputError. A pickled reward holds the address, not the token.
    """

    differentiable = False

    def __init__(self, endpoint: Endpoint, name: str, facts: Mapping[str, Any]) -> None:
        """Create a reward. name: its name on the server. facts: what the server says about it (`serve.app`)."""
        super().__init__()
        self.endpoint, self.name, self._facts = endpoint, name, dict(facts)
        self.reads_noise, self.wants_groups = facts["reads_noise"], facts["wants_groups"]
        self.scores_images = facts["scores_images"]
        self.eval()

    @classmethod
    def from_pretrained(
        cls, source: str, *, device: torch.device | str | None = None, **endpoint: Any
    ) -> "RemoteReward":
        """Ask the server at `source` which rewards it has, and return one. Waits for a server that is not up yet.

        Args:
            source: http://host:port, or http://host:port#NAME. Without a name: the server's first reward.
            device: ignored; scores are on the device of the latents.
            endpoint: `token`, `timeout`, `attempts` and `pause`, see `Endpoint`.
        """
        url, _, name = source.partition("#") if isinstance(source, str) else (source, "", "")
        asked = Endpoint(url, **endpoint)
        served = asked.ask("/v1/rewards")["rewards"]
        name = name or next(iter(served))
        if name not in served:
            known = f"{did_you_mean(name, served)} it has {', '.join(served)}"
            raise ValueError(f"remote: got the name {name!r}, which {url} does not serve; {known}")
        reward = cls(asked, name, served[name])
        reward.origin = Origin(cls.from_pretrained, source, endpoint, reward.fingerprint())
        return reward

    def fingerprint(self) -> str:
        return self._facts["fingerprint"]

    def forward(self, latents: Latents, prompts: Text, **noise: Unpack[Noise]) -> Tensor:
        """Return scores (B,), float32, of scaled clean latents (B, C, h, w) on any device.

        Arguments are as in `Reward.__call__`; a `generator` draws the noise here. Raises ConnectionError if the server
        does not answer, and InputError if the server refuses the request or has another reward.
        """
        latents = as_batch("latents", latents, torch.device("cpu"))
        self.check_gradient(latents)
        rows, levels = {"latents": latents}, None
        if self.reads_noise:
            more, levels = _noise_rows(latents, **noise)
            rows |= more
        return self._score(rows, prompts, levels).to(latents.device)

    def score_images(self, images: Any, prompts: Text, **options: Unpack[ImageOptions]) -> Tensor:
        """Return scores (B,), float32, of images as `image_tensor` takes them, also of different sizes.

        A `generator` draws one seed per sample here. Raises the errors of `forward`, and ValueError if the reward
        scores no images or `differentiable` is true.
        """
        if not self.scores_images or options.get("differentiable"):
            wanted = "gives no gradient" if self.scores_images else "reads latents and cannot score images"
            raise ValueError(f"reward {self.name!r} of {self.endpoint.url} {wanted}")
        pixels = [image for batch in image_batches(images) for image in batch]
        text, count = prompts_of(prompts, len(pixels)), len(pixels)
        seeds = options.get("seeds")
        if (generator := options.get("generator")) is not None:
            seeds = torch.randint(SEEDS, (count,), generator=generator, device=generator.device)
        drawn = {} if seeds is None or not self.reads_noise else {"seeds": torch.tensor(check_seeds(seeds, count))}
        sizes: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(pixels):
            sizes.setdefault(image.shape, []).append(index)
        scores = torch.empty(count)
        for chosen in sizes.values():
            rows = {"images": torch.stack([pixels[index] for index in chosen])}
            rows |= {name: tensor[chosen] for name, tensor in drawn.items()}
            scores[chosen] = self._score(rows, [text[index] for index in chosen], None)
        return scores.to(pixels[0].device)

    def _score(self, rows: Mapping[str, Tensor], prompts: Text, levels: Sequence[float] | None) -> Tensor:
        """Return scores (B,), on the CPU, of tensors whose first axis has the B samples. Large batches are split."""
        count = len(next(iter(rows.values())))
        strings = None
        if isinstance(prompts, Conditions) and not any(prompts.prompts):
            embeds = dict(prompt_embeds=prompts.prompt_embeds, pooled_prompt_embeds=prompts.pooled_prompt_embeds)
            rows = {**rows, **embeds}
        else:
            strings = prompts_of(prompts, count)
        rows = {name: tensor.detach().cpu() for name, tensor in rows.items()}
        each = sum(tensor[:1].nbytes for tensor in rows.values())
        size = max(1, min(self._facts["max_batch_size"], int(0.9 * self._facts["max_body_bytes"]) // each))
        size = count if self.wants_groups else size

        def ask(start: int) -> Tensor:
            part = slice(start, start + size)
            tensors = {name: tensor[part].contiguous() for name, tensor in rows.items()}
            number = len(next(iter(tensors.values())))
            return self._ask(request_body(tensors, strings and strings[part], levels), number)

        with ThreadPoolExecutor(self._facts["devices"]) as pool:  # with one device, requests go one after the other
            futures = [pool.submit(ask, start) for start in range(0, count, size)]
            try:
                return torch.cat([future.result() for future in futures])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, body: bytes, count: int) -> Tensor:
        """Send one request of `count` samples. Return the scores (count,), float32."""
        where = f"{self.endpoint.url}, reward {self.name!r}"
        found = self.endpoint.ask(f"/v1/score?reward={urllib.parse.quote(self.name, safe='')}", body)
        if found.get("fingerprint") != self.fingerprint():
            got = f"got scores of another reward ({found.get('fingerprint')}; expected {self.fingerprint()})"
            raise InputError(f"{where}: {got}; start the server with the reward that the run began with")
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


def _noise_rows(
    latents: Tensor,
    sigma: Sigma | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seeds: Seeds | None = None,
) -> tuple[dict[str, Tensor], Sequence[float] | None]:
    """Return the tensors of a request that set the noise, and the levels of an ensemble. Arguments: see `Noise`."""
    count, rows = len(latents), dict[str, Tensor]()
    if sigma is not None:
        sigma = check_sigma(sigma, count)
    levels = sigma if isinstance(sigma, tuple) else None
    if seeds is not None and noise is None and generator is None:
        rows["seeds"] = torch.tensor(check_seeds(seeds, count))
    elif noise is not None or generator is not None:
        drawn = draw_noise(latents, noise, generator, seeds, len(levels or [0]))
        rows["noise"] = drawn if drawn.dim() == 4 else drawn.transpose(0, 1)
    if sigma is not None and levels is None:
        rows["sigma"] = torch.as_tensor(sigma, dtype=torch.float32).expand(count)
    return rows, levels
