"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): momentum with orthogonalised updates of matrices."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch.optim.Muon with Newton-Schulz iterations in float32, for all matrices of one shape at once. Many CPUs
    compute in bfloat16, which torch.optim.Muon uses, more slowly than the whole forward and backward pass in float32.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads = torch.stack([p.grad for p in params])
                buffers = torch.stack([self.state[p]["momentum_buffer"] for p in params])
                buffers.lerp_(grads, 1 - group["momentum"])
                updates = grads.lerp(buffers, group["momentum"]) if group["nesterov"] else buffers
                updates = orthogonal(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for p, buffer, update in zip(params, buffers, updates):
                    self.state[p]["momentum_buffer"].copy_(buffer)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * group["lr"] * max(shape) ** 0.5)  # the RMS of AdamW's updates


def is_matrix(p: Tensor) -> bool:
    """Return whether Muon can train a parameter: a matrix with more than one row and column."""
    return p.ndim == 2 and min(p.shape) > 1


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return matrices (N, R, C) with singular values near 1, by the quintic Newton-Schulz iteration of Muon."""
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Together(torch.optim.Optimizer):
    """Optimiser that combines several optimisers of disjoint parameters and keeps their states in one state dict."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]
