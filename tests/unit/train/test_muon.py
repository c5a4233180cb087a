"""Muon and the choice of the optimiser."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from dinalrm_align.train.config import OptimConfig
from dinalrm_align.train.muon import Muon, Together
from dinalrm_align.train.state import build_optimizer


def test_muon_in_float32_steps_as_torchs_does_up_to_its_rounding():
    options = dict(lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    shapes, generator = ((16, 16), (16, 16), (48, 16), (16, 48)), torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        before = [p.detach().clone() for p in ours]
        for p, other in zip(ours, theirs):
            other.data.copy_(p.data)
            p.grad = torch.randn(p.shape, generator=generator)
            other.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, other, start in zip(ours, theirs, before):
            assert (p - other).norm() < 0.05 * (other - start).norm()


def test_optimisers_together_step_and_restore_as_they_do_apart():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def make():
        return Together(torch.optim.Muon([matrix], lr=0.1), torch.optim.AdamW([vector], lr=0.1))

    def step(optimizer):
        (matrix.square().sum() + vector.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    first = make()
    step(first)
    saved, at = copy.deepcopy(first.state_dict()), (matrix.detach().clone(), vector.detach().clone())
    assert sorted(saved["state"]) == [0, 1] and len(saved["param_groups"]) == 2
    step(first)
    went_to = matrix.detach().clone(), vector.detach().clone()

    matrix.data, vector.data = at[0].clone(), at[1].clone()
    second = make()
    second.load_state_dict(saved)
    step(second)
    assert torch.equal(matrix, went_to[0]) and torch.equal(vector, went_to[1])


def test_muon_trains_matrices_and_adamw_the_other_parameters_each_at_its_groups_rate():
    torch.manual_seed(0)
    matrix, row, vector, slow = (nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (1, 6), (6,), (4, 6)))
    groups = [{"params": [matrix, row, vector]}, {"params": [slow], "lr": 1e-4}]
    optimizer = build_optimizer(groups, OptimConfig(name="muon", lr=0.1, weight_decay=0.0))
    before = [p.detach().clone() for p in (matrix, row, vector, slow)]
    for p in (matrix, row, vector, slow):
        p.grad = torch.randn_like(p)
    optimizer.step()
    matrix_step, row_step, vector_step, slow_step = (start - p for p, start in zip((matrix, row, vector, slow), before))
    spectrum = torch.linalg.svdvals(matrix_step) / (0.1 * 0.2 * 6**0.5)
    assert (spectrum > 0.6).all() and (spectrum < 1.3).all()  # Newton-Schulz iterations are approximate
    for step, p in ((row_step, row), (vector_step, vector)):
        torch.testing.assert_close(step, 0.1 * p.grad.sign(), rtol=1e-3, atol=1e-5)  # AdamW's first step
    assert torch.linalg.svdvals(slow_step).max() < 1.3e-4 * 0.2 * 6**0.5
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 1e-4, 0.1]


@pytest.mark.parametrize("shape", [(3, 4), (4,)])
def test_muon_of_only_matrices_or_none_steps(shape):
    p = nn.Parameter(torch.ones(shape))
    optimizer = build_optimizer([{"params": [p]}], OptimConfig(name="muon", lr=0.1))
    p.grad = torch.ones(shape)
    optimizer.step()
    assert (p < 1).all()


def test_muon_refuses_sharded_weights(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        p = nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match="optim.name: got muon with weights that are sharded"):
            build_optimizer([{"params": [p]}], OptimConfig(name="muon"))
    finally:
        torch.distributed.destroy_process_group()
