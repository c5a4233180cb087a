"""torch.compile of transformer blocks, one graph for all blocks of one structure, without recompilations in a run.

Dynamo keeps its graphs per code object, and all blocks run the same code, `JointTransformerBlock.forward`. A run needs
more than dynamo's default of 8 graphs: blocks with and without a second attention, the last block, blocks of a reward;
each with and without gradient, with the adapter on and off, at batch 1 and above. ReFL needs 17; with batches of 1, 28.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

GRAPHS = 128
"""Number of graphs that dynamo may keep for one code object."""


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Apply torch.compile to each block, in place, with a dynamic batch dimension and without graph breaks.

    Batches of another size do not recompile, except those of size 1. A block that cannot be compiled, or more than
    `GRAPHS` graphs, raises an error of torch._dynamo: a block never runs uncompiled without notice. The limit is
    dynamo's setting for the whole process, and is only ever raised.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
    for block in blocks:
        block.register_forward_pre_hook(_mark_batch, with_kwargs=True)
        block.compile(backend=backend, fullgraph=True)


@torch.compiler.disable
def _mark_batch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell dynamo that the first dimension of every input varies."""
    for tensor in (*args, *kwargs.values()):
        if isinstance(tensor, Tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
