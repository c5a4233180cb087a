"""UnifiedReward (arXiv 2503.05236): a vision-language model that writes scores as text, on an OpenAI-compatible server.

Weights: hub ids CodeGoat24/UnifiedReward-qwen-7b, CodeGoat24/UnifiedReward-7b-v1.5, ...; for the licence see the model
card. Run the server in a separate environment, with vLLM or with SGLang (a two-line command):

    vllm serve CodeGoat24/UnifiedReward-qwen-7b --served-model-name UnifiedReward --port 8080
    python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --port 8080
        --served-model-name UnifiedReward --chat-template chatml-llava

Every version of the model has a prompt of its own (`TEMPLATES`). The name under which the server serves the model
selects the prompt: `--reward unifiedreward=http://host:8080/v1#UnifiedReward-2.0-qwen-7b`.

Scores lie in [1, 5]. Generated text has no gradient: use this reward for GRPO, DPO and evaluation, not for ReFL. An
answer that cannot be read is never a score: the question is repeated, then the run stops with its state saved.
"""

import base64
import dataclasses
import io
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from dinalrm_align.models.images import to_bytes
from dinalrm_align.reward.http import Server
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.train.files import InputError, parse_json, read_text
from dinalrm_align.train.settings import check_integer, did_you_mean

SOURCE = "http://127.0.0.1:8080/v1"
FIELD = "{prompt}"
LOW, HIGH = 1.0, 5.0


@dataclasses.dataclass(frozen=True)
class ChatEndpoint(Server):
    """Connection to a model on an OpenAI-compatible server. The model decodes greedily.

    Args:
        url: base URL of the server with the API version, for example http://127.0.0.1:8080/v1. api_key, timeout,
            attempts, pause: as in `Server`.
        model: name under which the server serves the model.
        max_tokens: maximum number of tokens in an answer.
    """

    model: str = "UnifiedReward"
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model: got {self.model!r}; expected the name under which the server serves it")
        check_integer("max_tokens", self.max_tokens, low=1)

    def ask(self, image: Image.Image, question: str, read: Callable[[str], float]) -> float:
        """Return `read(answer)` for the model's answer. `read` raises InputError for an answer to ask for again.

        Raises ConnectionError if the last attempt got no answer, and InputError if the last answer cannot be read or
        the server refuses the question.
        """
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        encoded = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": encoded}}, {"type": "text", "text": question}]
        options = dict(model=self.model, temperature=0, max_tokens=self.max_tokens)
        body = json.dumps(options | {"messages": [{"role": "user", "content": content}]}).encode()
        return self.request("/chat/completions", body, lambda answer: read(_content(answer, self.url)))


def _content(text: str, where: str) -> str:
    values = parse_json(text, f"the answer of {where}")
    try:
        content = values["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise InputError(f"{where}: got {text!r:.200}; expected a chat completion with choices[0].message.content")
    return content


@dataclasses.dataclass(frozen=True)
class Template:
    """A question with the field {prompt}. The score is the mean of the numbers that the answer gives after `labels`."""

    question: str
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.question.count(FIELD) != 1:
            raise ValueError(f"question: got {self.question.count(FIELD)} {FIELD}; expected one")

    def read(self, answer: str) -> float:
        """Return the mean of the numbers after the labels. Raise InputError unless each label has one in [1, 5]."""
        return sum(_number(label, answer) for label in self.labels) / len(self.labels)


_AXES = (
    "Alignment is how well the image matches the content of the caption, coherence how free it is of visual glitches "
    "and distorted objects, style how appealing it looks whatever the caption says.\n"
)
_FORM = "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\nText Caption: [{prompt}]"
_LABELS = ("Alignment Score", "Coherence Score", "Style Score")
TEMPLATES = {
    "point": Template(
        "Here are a caption and an image that was generated from it. Rate the image by two criteria: how faithfully it "
        "shows the objects, attributes and relations of the caption, and its overall quality: clarity, detail, colour, "
        "appeal. List the key elements of the caption, each as 'element (type): value', with value 1 where the "
        "image shows the element and 0 where it does not. Then close with a score from 1 to 5 after 'Final Score:'.\n"
        "Text Caption: [{prompt}]",
        ("Final Score",),
    ),
    "words": Template(
        "Here are a caption and an image that was generated from it. First score every word of the caption, higher "
        "where the image shows it less well, and then the token [No_mistakes], higher if everything is shown. "
        f"Then rate the image on three axes, each from 1 to 5. {_AXES}Answer in this form:\n\n---\n\n"
        f'Word-wise Scores: [["word1", score1], ..., ["[No_mistakes]", scoreM]]\n\n{_FORM}',
        _LABELS,
    ),
    "acs": Template(
        "Here are a caption and an image that was generated from it. Rate the image on three axes, each from 1 to 5. "
        f"{_AXES}Answer in this form:\n\n{_FORM}",
        _LABELS,
    ),
}
"""What each published prompt asks for, in this package's words and with the published answer format.

point: one score; the prompt of all versions before 2.0. words: scores of the words, alignment, coherence, style; a
second prompt of version 1.5 and of the qwen models. acs: alignment, coherence, style; the prompt of version 2.0.
Source: github.com/CodeGoat24/UnifiedReward, inference_llava/ and inference_qwen/ (commits ed52f98 and a759534).
"""


def template_of(model: str) -> str:
    """Return the key in `TEMPLATES` for the name of a served model. Raises ValueError for versions without scores."""
    if match := re.search(r"think|flex|edit", model, re.IGNORECASE):
        raise ValueError(
            f"model: got {model}; UnifiedReward-{match[0]} compares or edits images and has no prompt for the score of "
            "one image: serve another version, or name the prompt, template=..."
        )
    return "acs" if re.search(r"(?<!\d)2\.0", model) else "point"


class UnifiedReward(PixelReward):
    """A reward that queries UnifiedReward on a server and has no local weights. Create one with `from_pretrained`."""

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
        template: str | None = None,
        question: str | Path | None = None,
        vae: AutoencoderKL | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        side: int | None = 512,
        concurrency: int = 8,
        **endpoint: Any,
    ) -> "UnifiedReward":
        """Create a reward that queries the server at `source`. Nothing is sent until the first score.

        Args:
            source: base URL of the server, http://host:port/v1, or with the served model, http://host:port/v1#MODEL.
            endpoint: keyword arguments of `ChatEndpoint`: model, api_key, timeout, attempts, pause, max_tokens.
            template: question to the model, a key of `TEMPLATES`; `words` and `acs` give the mean of three scores.
                Default: that of the model's version (`template_of`).
            question: text file with a question that replaces the template's question and must contain {prompt}. Scores
                are comparable to published ones only with the wording in the model's repository.
            device, dtype: ignored; scores are on the VAE's device if there is one, else on the CPU.
            side: width and height of the images sent; None to keep their size. The authors evaluated with 512.
            concurrency: number of parallel requests.
        """
        source, _, named = source.partition("#")
        if named and endpoint.setdefault("model", named) != named:
            raise ValueError(f"model: got {endpoint['model']!r}, and {named!r} in the address; name it once")
        checked = ChatEndpoint(source, **endpoint)
        template = template_of(checked.model) if template is None else template
        if template not in TEMPLATES:
            near = did_you_mean(template, TEMPLATES)
            raise ValueError(f"template: got {template!r}; known: {', '.join(TEMPLATES)}{near}")
        chosen = TEMPLATES[template]
        if question is not None:
            chosen = dataclasses.replace(chosen, question=read_text(Path(question), "question"))
        return cls(checked, chosen, vae, side, concurrency)

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32, in [1, 5], of images (B, 3, H, W) in [0, 1] for B prompts, without gradient."""
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
        question = self.template.question.replace(FIELD, prompt)
        try:
            return self.endpoint.ask(image, question, self.template.read)
        except InputError as error:
            raise InputError(f"{self.endpoint.url}, prompt {prompt!r:.80}: {error}") from error


def _number(label: str, answer: str) -> float:
    """Return the number after the label in the answer, however Markdown, HTML, LaTeX or JSON decorate the two.

    The number may be followed by /5 or "out of 5". A comma counts as a decimal point. Raises InputError unless the
    answer has one such number, from 1 to 5.
    """
    decoration = r"(?:</?[a-z]+>|\\(?:boxed|text[a-z]*+|math[a-z]*+)?+|[*`#~$\[\](){}<>\"'_]|[^\S\n])+"
    plain = re.sub(decoration, " ", unicodedata.normalize("NFKC", answer), flags=re.IGNORECASE)
    number = r"([+-]?[0-9]++(?:[.,][0-9]++)?+)(?![.,]?[0-9]|[A-Za-z%\u2044])"
    no_range = r"(?! ?(?:[-–—→]|to\b|or\b)[->]* ?[0-9]| ?%| [0-9]+ ?[/\u2044])"  # 1-5, 3 to 4, 80 %, 4 1/2
    no_other_scale = r"(?! ?(?:/|(?:out )?of\b) ?+(?!(?:5(?:[.,]0++)?+(?![.,]?[0-9])|five\b)))"  # 4/10
    scale = r"(?: ?(?:1 ?(?:[-–]|to) ?5|(?:/|out of) ?5))?"
    words = label.replace(" ", r"\s")
    pattern = rf"{words}s?{scale} ?(?:[:=|\n] ?|is |[-–—] )+{number}{no_range}{no_other_scale}"
    found = {float(text.replace(",", ".")) for text in re.findall(pattern, plain, re.IGNORECASE)}
    if len(found) != 1 or not LOW <= min(found) <= HIGH:
        raise InputError(
            f"expected one '{label}: x' with x from {LOW:g} to {HIGH:g}, got {sorted(found) or 'none'} in an answer of "
            f"{len(answer)} characters that ends {answer[-200:]!r}"
        )
    return found.pop()
