"""Notice that weights have changed, from a few values of each tensor."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinalrm_align.train.checks import check

PROBES = 64
TOLERANCE = 1e-5  # relative; a dtype whose eps is larger gets its eps


class Probes:
    """At most 64 evenly spaced values of each tensor, as they are when the object is made.

    Quantised weights are left out, because fusing and unfusing a LoRA quantises them anew. Sharded weights (DTensor)
    are left out, because no process holds them whole. Tensors on the meta device have no values.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        plain = {n: t for n, t in tensors.items() if t.is_floating_point() and not isinstance(t, DTensor)}
        self.tensors = {name: tensor for name, tensor in plain.items() if tensor.numel() and not tensor.is_meta}
        views = self._views()
        self.counts = [len(view) for view in views]
        if views:
            self.values = torch.cat(views).float()
            spread = [view.float().square().mean().sqrt().expand_as(view) for view in views]
            self.scales = self.values.abs() + torch.cat(spread)

    def unchanged(self) -> Tensor:
        """Return a bool tensor, which of the values are unchanged, without waiting for the device.

        A change is a difference above eps (|value| + r), where r is the root mean square of the tensor's values and eps
        that of the dtype, at least 1e-5. To fuse and unfuse a LoRA rounds twice, which stays below, unless the update
        of the weight is above 2 r.
        """
        views = self._views()
        now = torch.cat([view.to(views[0].device) for view in views]).float()
        eps = max([TOLERANCE, *(torch.finfo(tensor.dtype).eps for tensor in self.tensors.values())])
        return (now - self.values.to(now.device)).abs() <= eps * self.scales.to(now.device)

    def check(self, advice: str) -> None:
        """Raise ValueError, with `advice` at its end, if a value has changed (see `train.checks` for when)."""
        if self.tensors:
            check(self.unchanged().logical_not().sum(), partial(self._judge, advice))

    def _judge(self, advice: str, changed: list[float]) -> None:
        if not changed[0]:
            return
        parts = zip(self.tensors, self.unchanged().split(self.counts), strict=True)
        first, *others = [name.replace(".base_layer", "") for name, part in parts if not part.all()]
        raise ValueError(f"{first} (and {len(others)} more): got other values than when the reward was built; {advice}")

    @torch.no_grad()
    def _views(self) -> list[Tensor]:
        return [_spread(tensor if tensor.is_contiguous() else tensor.contiguous()) for tensor in self.tensors.values()]


def _spread(tensor: Tensor) -> Tensor:
    """Return a view of at most 64 values of a contiguous tensor. The step is odd, so that not all are in one column."""
    step = max(1, tensor.numel() // PROBES - 1) | 1
    return tensor.as_strided((min(PROBES, -(-tensor.numel() // step)),), (step,))
