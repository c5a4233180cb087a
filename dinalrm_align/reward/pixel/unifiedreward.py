"""UnifiedReward (arXiv 2503.05236): a vision-language model that writes scores, behind an OpenAI-compatible server.

Weights: hub ids CodeGoat24/UnifiedReward-qwen-7b, CodeGoat24/UnifiedReward-7b-v1.5, ...; licence as on the model card.
The user runs the server in an environment of its own, for instance

    vllm serve CodeGoat24/UnifiedReward-qwen-7b --served-model-name UnifiedReward --port 8080
    python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --port 8080
        --served-model-name UnifiedReward --chat-template chatml-llava                      (one line)

Scores lie in [1, 5]. Text has no gradient: this reward is for GRPO, DPO and evaluation, not for ReFL.
"""

import dataclasses
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from dinalrm_align.models.images import to_bytes
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.pixel.chat_endpoint import ChatEndpoint
from dinalrm_align.train.files import read_text
from dinalrm_align.train.settings import check_integer, did_you_mean

SOURCE, MODEL = "http://127.0.0.1:8080/v1", "UnifiedReward"
FIELD = "{prompt}"
LOW, HIGH = 1.0, 5.0


@dataclasses.dataclass(frozen=True)
class Template:
    """A question with the field {prompt}, and labels of the numbers in its answer, whose mean is the score."""

    question: str
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.question.count(FIELD) != 1:
            raise ValueError(f"question: got {self.question.count(FIELD)} {FIELD}; expected one")

    def read(self, answer: str) -> float:
        """The score in an answer. Raises ValueError unless each label has one number, in [1, 5]."""
        return sum(_number(label, answer) for label in self.labels) / len(self.labels)


TEMPLATES = {
    "point": Template(
        "Here is a picture that was generated from a caption. Judge how faithfully it shows the objects, attributes "
        "and relations that the caption names, and how good the picture is: clarity, detail, colour, appeal. List the "
        "key elements of the caption, each as 'element (type): value', with value 1 where the picture shows it and 0 "
        "where it does not. Then close with a line 'Final Score: ' and a number from 1 to 5.\n"
        "Text Caption: [{prompt}]",
        ("Final Score",),
    ),
    "acs": Template(
        "Here is a picture that was generated from a caption. Rate it on three axes, each from 1 to 5, one line for "
        "each, in exactly this form:\nAlignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n"
        "Alignment is how well the picture matches the caption, coherence how free it is of glitches and distortions, "
        "style how appealing it looks whatever the caption says.\nText Caption: [{prompt}]",
        ("Alignment Score", "Coherence Score", "Style Score"),
    ),
}
"""point: one score, for every version; acs: alignment, coherence, style, since version 1.5. The wording is ours."""


class UnifiedReward(PixelReward):
    """UnifiedReward behind a server, without local weights. Create one with `from_pretrained`."""

    differentiable = False

    def __init__(
        self, endpoint: ChatEndpoint, template: Template, vae: AutoencoderKL | None, side: int | None, concurrency: int
    ) -> None:
        super().__init__(vae)
        check_integer("concurrency", concurrency, low=1, high=1024)
        if side is not None:
            check_integer("side", side, low=28)
        self.endpoint, self.template, self.side, self.concurrency = endpoint, template, side, concurrency

    @classmethod
    def from_pretrained(
        cls,
        source: str = SOURCE,
        *,
        model: str = MODEL,
        template: str = "point",
        question: str | Path | None = None,
        vae: AutoencoderKL | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        side: int | None = 512,
        concurrency: int = 8,
        **endpoint: Any,
    ) -> "UnifiedReward":
        """A reward that asks the server at `source`; no request is sent yet.

        Args:
            source: the endpoint, http://host:port/v1.
            model, endpoint: the model's name, and further fields of `ChatEndpoint`: api_key, timeout, attempts, ...
            template: point or acs (TEMPLATES): the question, and the numbers read from the answer.
            question: a text file to use as the question, with a field {prompt}; for scores comparable to published ones
                use the wording in the model's repository.
            device, dtype: ignored; scores are on the VAE's device, else on the CPU.
            side: images are sent as squares of that many pixels, 512 in the model's own evaluation; None: as they are.
            concurrency: parallel requests.
        """
        if template not in TEMPLATES:
            near = did_you_mean(template, TEMPLATES)
            raise ValueError(f"template: got {template!r}; known: {', '.join(TEMPLATES)}{near}")
        chosen = TEMPLATES[template]
        if question is not None:
            chosen = dataclasses.replace(chosen, question=read_text(Path(question), "question"))
        return cls(ChatEndpoint(source, model, **endpoint), chosen, vae, side, concurrency)

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], B prompts -> scores (B,), float32, in [1, 5], without gradient.

        Raises ValueError for an answer without its number, ConnectionError without an answer; other requests are
        cancelled.
        """
        self.check_gradient(images)
        sent = [Image.fromarray(pixels) for pixels in to_bytes(images)]
        with ThreadPoolExecutor(min(self.concurrency, len(sent))) as pool:
            futures = [pool.submit(self._score, *pair) for pair in zip(sent, prompts, strict=True)]
            try:
                scores = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(self, image: Image.Image, prompt: str) -> float:
        if self.side is not None:
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        answer = self.endpoint.ask(image, self.template.question.replace(FIELD, prompt))
        try:
            return self.template.read(answer)
        except ValueError as error:
            raise ValueError(f"{self.endpoint.url}, prompt {prompt!r:.80}: {error}") from error


def _number(label: str, answer: str) -> float:
    """The number after `label:` or `label (1-5):`, also written n/5."""
    number = r"(-?[0-9]++(?:\.[0-9]++)?+)"
    of_another_scale = r"(?!\s*+/\s*+(?!5(?![.0-9])))(?!\s*+-\s*+[0-9])"  # 4/10, and 1-5 as a range
    pattern = rf"{label}\s*(?:\(1\s*-\s*5\))?\s*:[\s*]*{number}{of_another_scale}"
    found = {float(number) for number in re.findall(pattern, answer, re.IGNORECASE)}
    if len(found) != 1 or not LOW <= min(found) <= HIGH:
        raise ValueError(
            f"expected one '{label}: x' with x from {LOW:g} to {HIGH:g}, got {sorted(found) or 'none'} in an answer of "
            f"{len(answer)} characters that ends {answer[-200:]!r}"
        )
    return found.pop()
