"""Settings of the reward server. Does not import torch."""

import re
from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.models.specs import ModelName
from dinalrm_align.reward.names import RewardText, parse_reward
from dinalrm_align.train.settings import IntFrom1To512, NonNegativeFloat, PositiveInt, check_fields, check_integer

DEFAULT = "default"
"""Name under which `--reward` is served."""


@dataclass
class ServeConfig:
    """Settings of `python -m dinalrm_align.serve`.

    Args:
        reward: reward to serve under the name `default`, for requests that name no reward: a name or a weighted sum, as
            in the recipes.
        rewards: further rewards by name, for example --rewards '{judge: pickscore, both: dinalrm + 0.2*pickscore}'. A
            request names one with ?reward=NAME. Rewards that have a part in common share its weights.
        model: auto, sd35, shapes, or folder or hub id of a StableDiffusion3Pipeline with the transformer of latent
            rewards, the text encoders and the VAE.
        text_length: T5 tokens that `dinalrm` rewards read, in place of the number in their checkpoints. Clients that
            send embeddings must encode prompts at this length (max_sequence_length of the pipeline).
        devices: devices, for example '[cuda:0, cuda:1]'; each has a copy of every reward. auto: a CUDA GPU if there is
            one, else the CPU.
        dtype: dtype of the weights; auto: the model's on a GPU, float32 on the CPU.
        host: address to listen on. Any address but a loopback address needs a token, in the environment variable
            DINALRM_TOKEN. Recipes and `RemoteReward` read the same variable and send its value as a bearer token.
            Clients that send no bearer token may use http://user:TOKEN@host:port. Traffic is not encrypted: use a
            proxy with TLS between networks.
        port: port to listen on.
        max_batch_size: largest number of samples that are scored together.
        max_wait_ms: milliseconds that a sample waits for others.
        max_queue: largest number of waiting samples per reward and device; then requests are answered with status 429.
        max_body_mb: largest size of a request in MiB.
        threads: CPU threads of each computation; null: torch's default.
    """

    reward: RewardText = "dinalrm"
    rewards: dict[str, RewardText] = field(default_factory=dict)
    model: ModelName = "auto"
    text_length: IntFrom1To512 | None = None
    devices: list[str] = field(default_factory=lambda: ["auto"])
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    host: str = "127.0.0.1"
    port: PositiveInt = 8000
    max_batch_size: PositiveInt = 8
    max_wait_ms: NonNegativeFloat = 10.0
    max_queue: PositiveInt = 256
    max_body_mb: PositiveInt = 64
    threads: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_integer("port", self.port, low=1, high=65535)
        for name, text in self.texts.items():
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(f"rewards: got the name {name!r}; expected letters, digits and any of _ . + -")
            parse_reward(text)
        if DEFAULT in self.rewards:
            raise ValueError(f"rewards: got the name {DEFAULT!r}, which is that of --reward; expected another")
        if not self.devices:
            raise ValueError("devices: got none; expected at least one")
        if self.max_queue < self.max_batch_size:
            raise ValueError(f"max_queue: got {self.max_queue}; expected at least max_batch_size {self.max_batch_size}")

    @property
    def texts(self) -> dict[str, str]:
        """All rewards by name, the default one first."""
        return {DEFAULT: self.reward, **self.rewards}

    def check_token(self, token: str | None) -> None:
        """Raise ValueError unless `token` is long enough, or None with an address that only this machine reaches."""
        private = self.host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", self.host)
        if token is None and not private:
            raise ValueError(
                f"host: got {self.host}, which other machines may reach; expected 127.0.0.1, or a token of 16 or more "
                'characters in the environment variable DINALRM_TOKEN: export DINALRM_TOKEN="$(openssl rand -hex 24)"'
            )
        if token is not None and not re.fullmatch(r"[\x21-\x7e]{16,}", token):
            raise ValueError("DINALRM_TOKEN: got a short or odd token; expected 16 or more ASCII characters, no spaces")
