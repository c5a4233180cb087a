"""Rewards for miles_diffusion, which scores each group of samples with one async function.

    --custom-rm-path dinalrm_align.adapters.miles_diffusion.rm              # the released reward, on the CPU

or, with a reward of your choice, a module my_reward.py on PYTHONPATH and --custom-rm-path my_reward.rm:

    from dinalrm_align.adapters.miles_diffusion import make_rm
    rm = make_rm("dinalrm + 0.2*pickscore", device="cuda", latents=False)

- **What is scored.** The decoded image, `generated_output`. With `latents=True`, the last latents of the trajectory:
  for rollouts of a model with this reward's latent space (SD3.5). Their Qwen-Image has another one, and their
  evaluation returns no trajectory: score images there.
- **Device.** The function runs in the rollout manager, a Ray actor that sees no GPU unless Ray gives it one.
- **Failures** stop the run: they leave the function, and the rollout does not catch them.
- No gradient. Tried with miles_diffusion 2929e49.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from torch import Tensor

from dinalrm_align.adapters.samples import Sample, sample_queue

Rm = Callable[..., Awaitable[list[float]]]


def make_rm(reward: str = "dinalrm", *, latents: bool = False, **settings: Any) -> Rm:
    """Return `async rm(args, samples, **kwargs)`, which returns one float per sample. The first call loads the reward.

    latents: whether to score the clean latents of the trajectory instead of the image. settings: as for
    `samples.sample_queue`: seed, max_batch_size, max_wait_ms, device, dtype, pipeline, options.
    """
    media = _latents if latents else _image

    def submit(samples: Sequence[Any]) -> list[Any]:
        queue = sample_queue(reward, **settings)
        return [queue.submit(Sample(media(sample), not latents, sample.prompt)) for sample in samples]

    async def rm(args: Any, samples: Sequence[Any], **kwargs: Any) -> list[float]:
        futures = await asyncio.to_thread(submit, samples)
        return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))

    return rm


def _image(sample: Any) -> Tensor:
    output = sample.generated_output
    if output is None or output.dim() != 4 or output.shape[1] != 1:
        got = "none" if output is None else tuple(output.shape)
        raise ValueError(f"generated_output: got {got}; expected one image (3, 1, H, W)")
    return output[:, 0]


def _latents(sample: Any) -> Tensor:
    trajectory = sample.dit_trajectory
    if trajectory is None or trajectory.latents is None or trajectory.sigmas is None:
        raise ValueError("dit_trajectory: got none, as in their evaluation; score images: make_rm(..., latents=False)")
    if len(trajectory.latents) != len(trajectory.sigmas) or float(trajectory.sigmas[-1]) != 0:
        got = f"{len(trajectory.latents)} latents, {len(trajectory.sigmas)} sigmas, the last {trajectory.sigmas[-1]:g}"
        raise ValueError(f"dit_trajectory: got {got}; expected one latent per sigma, and the clean one (sigma 0) last")
    return trajectory.latents[-1]


rm = make_rm()
