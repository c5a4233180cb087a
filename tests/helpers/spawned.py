"""What a spawned process runs: a module that the process can import, whatever way pytest was started."""

import torch


def score(reward, latents, prompts, seeds, queue):
    """Put the scores of a reward that was handed over by pickle into the queue."""
    torch.set_num_threads(1)
    queue.put(reward(latents, prompts, seeds=seeds).tolist())
