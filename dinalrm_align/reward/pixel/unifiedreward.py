"""UnifiedReward (arXiv 2503.05236): a vision-language model that writes its scores, behind an OpenAI-compatible server.

Weights: hub ids CodeGoat24/UnifiedReward-qwen-7b, CodeGoat24/UnifiedReward-7b-v1.5, ...; the licence is on each model's
card. The server is the user's, in its own environment, for instance

    vllm serve CodeGoat24/UnifiedReward-qwen-7b --served-model-name UnifiedReward --port 8080
    python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --port 8080
        --served-model-name UnifiedReward --chat-template chatml-llava                      (one line)

Scores lie in 1 to 5. Text has no gradient: this reward ranks and judges (GRPO, DPO, evaluation), ReFL cannot use it.
"""

import dataclasses
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.pixel.chat_endpoint import ChatEndpoint
from dinalrm_align.train.files import read_text
from dinalrm_align.train.settings import check_integer, did_you_mean

SOURCE, MODEL = "http://127.0.0.1:8080/v1", "UnifiedReward"
FIELD = "{prompt}"
LOW, HIGH = 1.0, 5.0


@dataclasses.dataclass(frozen=True)
class Template:
    """A question with {prompt} in it, and the labels before the numbers in its answer; the score is their mean."""

    question: str
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.question.count(FIELD) != 1:
            raise ValueError(f"question: got {self.question.count(FIELD)} {FIELD}; expected one")

    def read(self, answer: str) -> float:
        """The score in an answer. ValueError unless each label stands before one number, the same wherever it stands,
        from 1 to 5.
        """
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
"""point: one score, of every version; acs: alignment, coherence and style, of version 1.5 on. The wording is ours."""


class UnifiedReward(PixelReward):
    """UnifiedReward behind a server; build one with `from_pretrained`. It has no weights here."""

    differentiable = False

    def __init__(
        self,
        endpoint: ChatEndpoint,
        template: Template,
        *,
        vae: AutoencoderKL | None = None,
        side: int | None = 512,
        concurrency: int = 8,
    ) -> None:
        """side: pictures are sent as squares of that many pixels, None: as they are. concurrency: questions at once."""
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
        api_key: str | None = None,
        side: int | None = 512,
        concurrency: int = 8,
        timeout: float = 120.0,
        attempts: int = 3,
        pause: float = 1.0,
    ) -> "UnifiedReward":
        """A reward that asks the server at `source`; nothing is asked yet.

        Args:
            source: the endpoint, http://host:port/v1.
            model: the name under which the server serves the model.
            template: "point" or "acs" (TEMPLATES): what is asked, and which numbers are read in the answer.
            question: a text file to ask instead of the template's own words, with {prompt} where the caption goes. For
                numbers to compare with published ones give the wording in the model's own repository.
            vae: the decoder of the latents to be scored; without one, pictures alone can be scored.
            device, dtype: without effect; scores lie where the VAE is, else on the CPU.
            side: 512 x 512 pixels are sent, as in the model's own evaluation; None: pictures as they are.
            concurrency, timeout, attempts, pause: questions at once; `ChatEndpoint`.

        Raises ValueError for an unknown template, a question without {prompt} and a source that is no endpoint.
        """
        if template not in TEMPLATES:
            near = did_you_mean(template, TEMPLATES)
            raise ValueError(f"template: got {template!r}; known: {', '.join(TEMPLATES)}{near}")
        chosen = TEMPLATES[template]
        if question is not None:
            chosen = dataclasses.replace(chosen, question=read_text(Path(question), "question"))
        endpoint = ChatEndpoint(source, model, api_key, timeout=timeout, attempts=attempts, pause=pause)
        return cls(endpoint, chosen, vae=vae, side=side, concurrency=concurrency)

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], B prompts -> scores (B,), float32 in 1 to 5, without gradient.

        Raises ValueError when a gradient is wanted, and for an answer without its number: no score is made up.
        ConnectionError when the server does not answer. Either way nothing is asked any more.
        """
        self.check_gradient(images)
        pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(picture) for picture in pixels]
        with ThreadPoolExecutor(min(self.concurrency, len(pictures))) as pool:
            futures = [pool.submit(self._score, *pair) for pair in zip(pictures, prompts, strict=True)]
            try:
                scores = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(self, picture: Image.Image, prompt: str) -> float:
        if self.side is not None:
            picture = picture.resize((self.side, self.side), Image.Resampling.BICUBIC)
        answer = self.endpoint.ask(picture, self.template.question.replace(FIELD, prompt))
        try:
            return self.template.read(answer)
        except ValueError as error:
            raise ValueError(f"{self.endpoint.url}, prompt {prompt!r:.80}: {error}") from error


def _number(label: str, answer: str) -> float:
    """The number after `label:` (or `label (1-5):`), alone or as n/5."""
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
