"""Rewards in MixGRPO (https://github.com/Tencent-Hunyuan/MixGRPO, e5cdd6a), in the place of its PickScore.

MixGRPO reads the names of five reward classes and has no place for a sixth. Two lines before its script, in a file that
ends with `runpy.run_path("fastvideo/train_grpo_flux.py", run_name="__main__")`:

    import dinalrm_align.adapters.mixgrpo as plug
    plug.install("dinalrm", pipeline="stabilityai/stable-diffusion-3.5-medium")

and `--reward_model pick_score --pick_score_weight 1.0`. Its logs say PickScoreRewardModel.

- **What is scored.** One PIL image of FLUX at a time, rounded to 8 bits. Latents of FLUX fit no reward of SD3.5, so
  latent rewards encode the image and score it at the checkpoint's noise level for images. No gradient.
- **Failures.** MixGRPO catches every Exception of a reward and goes on with reward 0. The adapter therefore raises
  `ScoringFailed`, a BaseException, which ends the run.
"""

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from dinalrm_align.adapters.shared import finite_floats, framework, pointwise, shared_reward

_CLONE = "clone https://github.com/Tencent-Hunyuan/MixGRPO and put it on PYTHONPATH"


class ScoringFailed(BaseException):
    """A reward could not score. Not an Exception, so that MixGRPO does not count it as reward 0."""


def install(reward: str = "dinalrm", **place: Any) -> None:
    """Replace MixGRPO's PickScore by `reward`, the text of `load_reward`. Call it once, before MixGRPO's script.

    place: `pipeline`, `dtype`, `options`, `local_files_only`, as in `load_reward`. Raises ImportError without MixGRPO.
    """
    module = framework("fastvideo.models.reward_model.pick_score", _CLONE)

    class PickScoreRewardModel:  # MixGRPO reads this name
        def __init__(self, device: Any = "cuda", **unused: Any) -> None:
            self.reward = pointwise(shared_reward(reward, device=device, **place))

        def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
            try:
                return finite_floats(self.reward.score_images(images, prompts))
            except Exception as error:
                raise ScoringFailed(f"reward {reward!r} failed: {error}") from error

    module.PickScoreRewardModel = PickScoreRewardModel
