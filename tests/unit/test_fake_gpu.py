"""The GPU that is not there: each planted device error is found, correct code has none, and waits are counted."""

import threading

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from fake_gpu import FakeGpu, forget_accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


class Shifted(nn.Module):
    """Adds a tensor that is no buffer, so that `Module.to` leaves it behind."""

    def __init__(self):
        super().__init__()
        self.linear, self.shift = nn.Linear(4, 4), torch.ones(4)

    def forward(self, x):
        return self.linear(x) + self.shift


def gpu_ones(*shape):
    return torch.ones(*shape, device="cuda")


def recomputed(make):
    """Run a checkpointed function twice: the first pass uses a GPU tensor, the recomputation what `make` returns."""
    passes = []

    def part(x):
        passes.append(1)
        return (x + (gpu_ones(4) if len(passes) == 1 else make())) * x

    checkpoint(part, gpu_ones(4).requires_grad_(), use_reentrant=False).sum().backward()


def optimiser_state():
    weight = gpu_ones(4).requires_grad_()
    optimizer = torch.optim.AdamW([weight])
    weight.grad = gpu_ones(4)
    optimizer.step()
    optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].cpu()
    optimizer.step()


def weight_data():
    linear = nn.Linear(4, 4).to("cuda")
    linear.weight.data = torch.ones(4, 4)
    linear(gpu_ones(1, 4))


def gradient():
    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.ones(4)

    x = gpu_ones(4).requires_grad_()
    Lost.apply(x * gpu_ones(4)).sum().backward()


def average():
    weight, mean = gpu_ones(4), torch.ones(4)
    mean.lerp_(weight, 0.5)


def in_thread():
    thread = threading.Thread(target=lambda: gpu_ones(4) + torch.ones(4))
    thread.start()
    thread.join()


def asynchronous_read():
    (gpu_ones(4) * 2).to("cpu", non_blocking=True).tolist()


def unread_event():
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    end.record()
    start.elapsed_time(end)


PLANTED = {
    "noise on the CPU": lambda: gpu_ones(4) + torch.randn(4),
    "embeddings on the CPU": lambda: nn.Linear(4, 4).to("cuda")(torch.ones(2, 4)),
    "embeddings of two devices": lambda: torch.cat([gpu_ones(2, 4), torch.ones(2, 4)]),
    "a table on the CPU at indices on the GPU": lambda: torch.ones(4)[torch.arange(2, device="cuda")],
    "a GPU table looked up at CPU indices": lambda: nn.Embedding(4, 2).to("cuda")(torch.arange(2)),
    "gather with arange on the CPU": lambda: gpu_ones(4).gather(0, torch.arange(2)),
    "scatter at CPU indices": lambda: gpu_ones(4).scatter(0, torch.zeros(1, dtype=torch.int64), 1.0),
    "values on the CPU for GPU rows": lambda: gpu_ones(4, 2).index_put_((torch.tensor([0, 1]),), torch.ones(2, 2)),
    "a mask on the CPU": lambda: gpu_ones(4).masked_fill(torch.ones(4, dtype=torch.bool), 0.0),
    "torch.tensor without device": lambda: gpu_ones(2) * torch.tensor([1.0, 2.0]),
    "a NumPy array": lambda: gpu_ones(2) * torch.from_numpy(np.ones(2, dtype=np.float32)),
    "a tensor that Module.to does not move": lambda: Shifted().to("cuda")(gpu_ones(1, 4)),
    "a module left behind": lambda: nn.LayerNorm(4)(gpu_ones(1, 4)),
    "a scalar on the CPU, added to in place": lambda: torch.tensor(0.0).add_(gpu_ones(1).sum()),
    "a scalar on the CPU in a matrix product": lambda: torch.addmm(torch.tensor(1.0), gpu_ones(2, 2), gpu_ones(2, 2)),
    "a CPU generator for a GPU tensor": lambda: torch.randn(4, generator=torch.Generator(), device="cuda"),
    "a GPU generator for a CPU tensor": lambda: torch.randn(4, generator=torch.Generator("cuda")),
    "a CPU generator in place": lambda: gpu_ones(4).normal_(generator=torch.Generator()),
    "numpy": lambda: gpu_ones(4).numpy(),
    "numpy.asarray": lambda: np.asarray(gpu_ones(4)),
    "pin_memory": lambda: gpu_ones(4).pin_memory(),
    "recomputed with a tensor on the CPU": lambda: recomputed(lambda: torch.ones(4)),
    "recomputed with zeros on the CPU": lambda: recomputed(lambda: torch.zeros(4)),
    "optimiser state": optimiser_state,
    "weights exchanged through .data": weight_data,
    "a gradient on the CPU": gradient,
    "an average on the CPU": average,
    "in a thread": in_thread,
    "an asynchronous copy, read at once": asynchronous_read,
    "the time of an event, read at once": unread_event,
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error):
    with FakeGpu() as gpu:
        PLANTED[error]()
    assert gpu.faults.total() >= 1
    assert "tests/unit/test_fake_gpu.py" in next(iter(gpu.faults))


def test_correct_code_has_no_faults_and_the_values_of_the_cpu(tmp_path):
    """Training with recomputation, autocast, AdamW, clipping, an average, and a checkpoint of safetensors."""

    def train(device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)).to(device)
        model.register_buffer("scale", torch.full((), 2.0, device=device))
        optimizer, mean = torch.optim.AdamW(model.parameters()), [p.detach().clone() for p in model.parameters()]
        generator = torch.Generator(device).manual_seed(0)
        for _ in range(2):
            x = torch.randn(3, 4, generator=generator, device=device).normal_(generator=generator)
            with torch.autocast(device, dtype=torch.bfloat16):
                y = checkpoint(model, x, use_reentrant=False) * model.scale
            loss = nn.functional.one_hot(y.argmax(1), 4).mul(y).mean() + torch.where(y > 0, y, 0.0).square().mean()
            y.retain_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            torch._foreach_lerp_(mean, [p.detach() for p in model.parameters()], 0.5)
        save_file(model.state_dict(), tmp_path / device)
        return loss.item(), {name: tensor.to(device) for name, tensor in load_file(tmp_path / device).items()}, mean

    plain = train("cpu")
    with FakeGpu() as gpu:
        loss, weights, mean = train("cuda")
        assert {tensor.device for tensor in (*weights.values(), *mean)} == {torch.device("cuda", 0)}
    assert not gpu.faults, gpu.report()
    assert loss == plain[0] and all(torch.equal(weights[name], plain[1][name]) for name in weights)


def test_what_cuda_allows_is_no_fault():
    with FakeGpu() as gpu:
        x = gpu_ones(4)
        x + torch.tensor(2.0)  # a 0-dim CPU tensor in a pointwise operator
        x[0] = 3.0
        x[torch.tensor([0, 1])] = 0.0
        x.copy_(torch.ones(4))
        torch.ones(4).copy_(x)
        torch.nn.functional.scaled_dot_product_attention(*[gpu_ones(1, 1, 3, 4)] * 3, is_causal=True)
        x.new_zeros(2) + torch.zeros_like(x)[:2] + torch.randn(2, generator=torch.Generator("cuda"), device="cuda")
        assert x[:2].device == torch.device("cuda", 0) and x.cpu().device == torch.device("cpu") and x.is_cuda
    assert not gpu.faults, gpu.report()


def test_the_gradient_of_a_copy_goes_back_to_the_other_device():
    with FakeGpu() as gpu:
        weight = torch.ones(4, requires_grad=True)
        (weight.to("cuda", torch.bfloat16) * gpu_ones(4)).sum().backward()
        assert weight.grad.device == torch.device("cpu") and weight.grad.dtype == torch.float32
    assert not gpu.faults, gpu.report()


WAITS = {
    "item": (lambda x: x.sum().item(), 1),
    "bool": (lambda x: bool((x > 0).all()), 1),
    "float": (lambda x: float(x.sum()), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "a copy to the CPU": (lambda x: x.cpu(), 1),
    "an index by a mask": (lambda x: x[x > 0], 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "synchronize": (lambda x: torch.cuda.synchronize(), 1),
    "a value for a mask": (lambda x: x.__setitem__(x > 0, 0.0), 0),
    "an asynchronous copy": (lambda x: x.to("cpu", non_blocking=True), 0),
    "device and shape": (lambda x: (x.device, x.shape, x.is_cuda, len(x)), 0),
    "a scalar of the CPU": (lambda x: torch.tensor(1.0).item(), 0),
}


@pytest.mark.parametrize("what", WAITS)
def test_waits_are_counted(what):
    call, count = WAITS[what]
    with FakeGpu() as gpu:
        x = gpu_ones(4)
        assert not gpu.waits
        call(x)
    assert gpu.waits.total() == count, gpu.report()


def test_uploads_that_wait_are_counted():
    with FakeGpu() as gpu:
        torch.ones(4).to("cuda")
        torch.tensor([1.0], device="cuda")
        gpu_ones(4)[[0, 1]]
        assert gpu.uploads.total() == 3
        torch.ones(4).pin_memory().to("cuda", non_blocking=True)
        torch.zeros(4, device="cuda")
    assert gpu.uploads.total() == 3 and not gpu.waits, gpu.report()


def test_an_asynchronous_copy_may_be_read_after_a_wait():
    with FakeGpu() as gpu:
        copied, done = (gpu_ones(4) * 2).to("cpu", non_blocking=True), torch.cuda.Event()
        done.record()
        done.synchronize()
        assert copied.tolist() == [2, 2, 2, 2]
    assert not gpu.faults and gpu.waits.total() == 1


def test_strict_raises_at_the_fault():
    with FakeGpu(strict=True), pytest.raises(RuntimeError, match="fake GPU: aten.add.Tensor: tensors on cuda and cpu"):
        gpu_ones(2) + torch.ones(2)


def test_outside_the_context_nothing_is_left():
    forget_accelerator()
    with FakeGpu():
        x = gpu_ones(2)
        assert Accelerator().device.type == "cuda" and torch.cuda.is_available()
    assert x.device == torch.device("cpu") and not torch.cuda.is_available()
    assert Accelerator().device.type == "cpu" and type(torch.Generator()) is torch.Generator
    forget_accelerator()
