"""Shard the frozen base weights over ranks with FSDP2. The weights of a block are gathered when the block runs.

A policy and the rewards that share its weights are different module trees over the same Parameters, but `fully_shard`
needs a single owner of each Parameter. So for each i, one `SharedBlock` holds the i-th blocks of all trees. The
`SharedBlock` is sharded, and every tree runs its i-th block by calling the `SharedBlock`. LoRA, head, embeddings and
the last projection stay whole on every rank. All ranks must run the same number of blocks in the same order.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dinalrm_align.reward.backbones.sd3 import SD3Trunk
from dinalrm_align.reward.model import RewardModel
from dinalrm_align.reward.protocol import Reward


def sharding_asked() -> bool:
    """Return whether the environment requests FSDP (ACCELERATE_USE_FSDP). Raise ValueError for FSDP1 or CPU offload."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"FSDP version: got {version}; expected 2: set fsdp_version: 2 in accelerate's config file")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError("fsdp_offload_params: got true; weights are sharded over GPUs here, set it to false")
    return True


class SharedBlock(nn.Module):
    """Holds the i-th block of several module trees. The first argument of `forward` is the index of the tree to run."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.forwards = [block.forward for block in blocks]

    def forward(self, tree: int, *args: Any, **kwargs: Any) -> Any:
        return self.forwards[tree](*args, **kwargs)


def shard_base(accelerator: Accelerator, transformer_blocks: nn.ModuleList, rewards: Sequence[Reward]) -> None:
    """Shard a policy's blocks over the ranks, in place. All latent rewards in `rewards` must share its base weights.

    Must be called on every rank, after policy and rewards are moved to the device and cast. With a single rank, the
    call changes nothing. transformer_blocks: the policy's blocks.
    """
    trunks = [part.backbone for reward in rewards for part in reward.noise_parts]
    if private := [trunk for trunk in trunks if not trunk.shared]:
        got = f"{len(private)} rewards have base weights of their own, a copy on every process"
        raise ValueError(f"FSDP: {got}: build them with share_weights=True, or run without FSDP")
    _shard(accelerator, [transformer_blocks, *(trunk.transformer_blocks for trunk in trunks)], trunks)


def shard_model(accelerator: Accelerator, model: RewardModel) -> None:
    """Shard the blocks of a reward model, for reward training. With a single rank, the call changes nothing."""
    _shard(accelerator, [model.trunk.transformer_blocks], [model.trunk])


def _shard(accelerator: Accelerator, trees: Sequence[nn.ModuleList], trunks: Sequence[SD3Trunk]) -> None:
    count = accelerator.num_processes
    if count == 1:
        return
    mesh = init_device_mesh(accelerator.device.type, (count,))
    sharded: set[int] = set()
    for number in range(max(len(tree) for tree in trees)):
        blocks = [tree[number] for tree in trees if number < len(tree)]
        shared = SharedBlock(blocks)
        kept = {p for name, p in shared.named_parameters() if p.requires_grad or ".lora_" in name}
        base = [p for p in shared.parameters() if p not in kept]
        if not all(p.is_floating_point() for p in base):
            raise ValueError("FSDP takes no quantised base weights: leave --memory.base_quant out, or run without FSDP")
        sharded |= {id(p) for p in base}
        fully_shard(shared, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        for tree, block in enumerate(blocks):
            block.forward = functools.partial(shared, tree)
    accelerator.print(f"the frozen base weights are sharded over {count} processes")
    for trunk in trunks:  # release the unsharded weights
        trunk.share([tensor for tensor in trunk.shared if id(tensor) not in sharded])
