"""FSDP2: each process keeps its share of the frozen base weights, and of one block at a time all of them.

A policy and the rewards that share its weights are different module trees over the same Parameters, which
`fully_shard` does not take apart by itself: it wants one owner. So every block of the transformer and its namesakes in
the rewards' trunks become children of one `SharedBlock`; that one is sharded, and each of them runs through it. Whoever
calls a block, by whichever tree, gathers its weights before and lets them go after, in the backward pass as in the
forward one. What is trained (LoRA, head) is small and stays whole on every process, as do embeddings and the last
projection; `loop.fit` averages the gradients.

Every gathering is a step that all processes make together: they must run as many blocks, in the same order.
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


def sharding_asked() -> bool:
    """Whether the launcher asked for FSDP (`accelerate launch` with use_fsdp, or ACCELERATE_USE_FSDP=true).

    ValueError for the first version of FSDP, and for weights that are to stay in the CPU's memory.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"FSDP version: got {version}; expected 2: set fsdp_version: 2 in accelerate's config file")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError("fsdp_offload_params: got true; weights are sharded over GPUs here, set it to false")
    return True


class SharedBlock(nn.Module):
    """One block as several trees have it; the number that comes first says whose forward is meant."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.forwards = [block.forward for block in blocks]

    def forward(self, tree: int, *args: Any, **kwargs: Any) -> Any:
        """What that tree's block gives."""
        return self.forwards[tree](*args, **kwargs)


def shard_base(
    accelerator: Accelerator, transformer_blocks: nn.ModuleList | None, trunks: Sequence[SD3Trunk] = ()
) -> None:
    """Shard the blocks of a policy's transformer and of the trunks that share its weights, in place, over all
    processes; without a policy (None) those of one trunk alone.

    Called by every process once all trees are built, in their place and dtype: no other reward can share the weights
    afterwards. One process keeps all of it, as it is. Raises ValueError for quantised weights, and for a trunk with
    weights of its own beside a policy.
    """
    private = [trunk for trunk in trunks if not trunk.shared]
    if transformer_blocks is not None and private:
        raise ValueError(
            f"{len(private)} rewards have base weights of their own, a copy on every process, where FSDP was asked for "
            "to save memory: build them with share_weights=True, or run without FSDP"
        )
    trees = [list(trunk.transformer_blocks) for trunk in trunks]
    if transformer_blocks is not None:
        trees.insert(0, list(transformer_blocks))
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
    for trunk in trunks:  # the whole weights are to be let go
        trunk.shared = tuple(tensor for tensor in trunk.shared if id(tensor) not in sharded)
