"""Savings: counts against independent ones, counted peaks against the profiler, tables and the figure."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dinalrm_align.align.savings.config import (
    FULL,
    ROLLOUT_STEPS,
    Architecture,
    Case,
    SavingsRun,
    all_cases,
    economies,
)
from dinalrm_align.align.savings.cost import Cost, FakeFloats, Measured, OperationCounter, count, measure
from dinalrm_align.align.savings.report import draw_costs, measured_table, paper_readings, report, stacks, to_json
from dinalrm_align.align.savings.workloads import PackedLinear, build_networks, workload_of
from dinalrm_align.models.specs import MODELS
from dinalrm_align.reward.checkpoint import read_checkpoint
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.train.files import read_json, read_yaml

RECIPE = Path(__file__).parents[3] / "recipes" / "savings.py"
KEPT = dict(policy_checkpointing=False, reward_checkpointing=False)


@pytest.mark.parametrize(
    ("case", "f2", "m0"),
    [  # tera, batch 1: F2 with the attention scores kept (backward twice forward), M0
        (Case(work="score", text_length=128), 6.74, 2.059),
        (Case(work="score", text_length=256), 6.92, 2.106),
        (Case(work="score", text_length=128, merged=True), 6.59, 1.985),
        (Case(work="gradient", text_length=128, size=512, **KEPT), 2.86, None),
        (Case(work="policy_forward", text_length=128, size=512), 2.25, None),
        (Case(work="vae_decode"), 10.5, 4.95),
        (Case(work="vae_gradient", **KEPT), 21.5, 9.90),
        (Case(work="vae_encode", size=512), 1.12, None),
        (Case(work="pixels", reward="hpsv3"), 12.2, 5.88),
    ],
    ids=lambda value: "-".join(map(str, (value.reward, value.work, value.size))) if isinstance(value, Case) else "",
)
def test_counts_of_the_full_size_agree_with_those_made_before(case, f2, m0):
    """Counted independently with torch's FlopCounterMode on the meta device, weights in the same classes."""
    cost = count(case, FULL)
    assert cost.f2_kept / 1e12 == pytest.approx(f2, rel=0.02)
    assert m0 is None or cost.m0 / 1e12 == pytest.approx(m0, rel=0.02)


def test_an_ensemble_of_three_costs_three_backbones():
    one, three = (count(Case(work="score", size=256, levels=levels), FULL) for levels in (1, 3))
    assert three.f2 / one.f2 == pytest.approx(3, rel=0.01)


@pytest.fixture(scope="module")
def embedded() -> Architecture:
    """The embedded world's own networks, and a small Qwen2-VL."""
    spec = MODELS["shapes"]

    def config(folder: Path) -> dict:
        return {name: value for name, value in read_json(folder / "config.json").items() if not name.startswith("_")}

    qwen = dict(
        text_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=300, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
        ),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2),
        image_token_id=297, video_token_id=298, vision_start_token_id=296, vision_end_token_id=295,
    )  # fmt: skip
    return Architecture(
        transformer=config(Path(spec.pipeline) / "transformer"), vae=config(Path(spec.pipeline) / "vae"),
        reward=read_checkpoint(Path(spec.reward)).config, policy=LoraConfig(16, 16.0), clip=config(Path(spec.pixel)),
        qwen=qwen, qwen_tokens=40, qwen_pixels=16 * 28 * 28, clip_tokens=14, vae_factor=4,
    )  # fmt: skip


TINY = Case(size=64, batch=2, text_length=16, dtype="float32", vae_dtype="float32")


def profiled_memory(case: Case, architecture: Architecture) -> int:
    """Bytes at the peak of a real step on the CPU: weights, AdamW's moments, and the profiler's memory events."""
    generator = torch.Generator().manual_seed(0)

    def make(tensor: torch.Tensor) -> torch.Tensor:
        new = torch.zeros(tensor.shape, dtype=tensor.dtype)
        return new.normal_(0, 0.02, generator=generator) if tensor.is_floating_point() else new

    networks = build_networks(architecture, case, make)
    prepare, run = workload_of(networks)
    prepare()
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    moments = sum(8 * p.numel() for p in networks.policy.parameters.values()) if case.trains else 0
    return networks.weight_bytes() + moments + peak


@pytest.mark.parametrize(
    "case",
    [
        TINY.but(work="refl"),
        TINY.but(work="grpo"),
        TINY.but(work="gradient", **KEPT),
        TINY.but(work="gradient", reward="pickscore", **KEPT),
    ],
    ids=lambda case: f"{case.reward}-{case.work}",
)
def test_predicted_peaks_agree_with_a_real_step_by_the_profiler(case, embedded):
    cost = count(case, embedded)
    assert cost.activations == pytest.approx(profiled_memory(case, embedded) - cost.weights - cost.state, rel=0.05)


def test_kernels_bytes_and_time_by_hand():
    """A product of (64, 32) and (32, 16) in float32, 65,536 FLOPs, and its sum with a row: two kernels.

    Inputs and outputs: (64 32 + 32 16 + 64 16) 4 = 14,336 bytes, and (64 16 + 16 + 64 16) 4 = 8,256. A view is free.
    Each takes a launch, 4 us. At 8192 in bfloat16, the FLOPs decide: 2 8192^3 / (0.65 989e12) = 1.71 ms.
    """
    counter, fake = OperationCounter(), FakeFloats()
    with fake.active():
        left, right, row = torch.randn(64, 32), torch.randn(32, 16), torch.randn(16)
        large = torch.randn(8192, 8192, dtype=torch.bfloat16)
        with counter:
            (left @ right).view(8, 8, 16).view(64, 16) + row
        assert (counter.kernels, counter.moved, counter.seconds) == (2, 14_336 + 8_256, pytest.approx(8e-6))
        counter.clear()
        with counter:
            large @ large
        assert counter.kernels == 1 and counter.seconds == pytest.approx(2 * 8192**3 / (0.65 * 989e12))


def test_recomputing_and_quantising_save_memory_and_cost_operations(embedded):
    kept, again = (count(TINY.but(work="gradient", **change), embedded) for change in (KEPT, {}))
    assert again.activations < kept.activations and again.f2 > kept.f2
    packed = count(TINY.but(work="gradient", base_quant="nf4"), embedded)
    assert packed.weights < 0.7 * again.weights and packed.f2 == pytest.approx(again.f2, rel=0.05)


def test_int8_weights_are_not_measured(embedded):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="int8 weights are counted, not measured"):
        measure(TINY.but(base_quant="int8"), embedded, warmup=0, repeats=1)


def test_floats_are_fake_and_integers_real():
    with FakeFloats().active():
        values, numbers = torch.randn(2**20, 2**20), torch.tensor([[1, 2], [3, 4]])
        assert (values @ values).shape == values.shape  # 4 TiB each
        assert bool(torch.isfinite(values).all()) and int((~torch.isfinite(values)).sum()) == 0
        assert (numbers * 2).tolist() == [[2, 4], [6, 8]] and torch.randint(5, 6, ()).item() == 5
        assert values[:2, :2][numbers > 1].shape == (3,)


def test_packed_weights_take_as_many_bytes_as_bitsandbytes_does():
    """nf4: 64 x 128 / 2 + 4 bytes for each 64 of them; int8: 64 x 128 + 4 for each row."""
    linear = torch.nn.Linear(128, 64, bias=False)

    def size(kind: str) -> int:
        packed = PackedLinear(linear, kind)
        return sum(t.numel() * t.element_size() for t in (*packed.parameters(), *packed.buffers()))

    assert (size("nf4"), size("int8")) == (4096 + 512, 8192 + 256)


RUN = SavingsRun(workers=1)


def made_up_costs() -> dict[Case, Cost]:
    """Every case that the recipe counts; a pixel reward weighs twice as much as a latent one."""
    costs = {}
    for case in all_cases(RUN):
        scale = 2 if case.pixel else 1
        sizes, operations = (scale * 2**32, 2**27, scale * 2**31), scale * case.batch * 10**13
        costs[case] = Cost(
            *sizes, operations, operations, operations // 10, 10**12, 1000, 10**9, scale * case.batch * 0.02
        )
    return costs


def test_savings_stand_beside_the_papers():
    readings = paper_readings(RUN.base, made_up_costs())
    assert readings["reward FLOPs"] == {"paper": 71.1, "hpsv3": 50.0, "pickscore": 50.0}
    assert readings["optimisation FLOPs"]["hpsv3"] == pytest.approx(100 * (1 - 2 / 3))  # the policy is not halved
    assert readings["gradient part of an update, executed"]["hpsv3"] == pytest.approx(50.0)
    # 34.5 steps of two rows, 20 TFLOP, in both rollouts: 1 - (690 + 10) / (690 + 20)
    with_rollout = readings["update with its rollout, executed"]
    assert with_rollout["hpsv3"] == pytest.approx(100 * (1 - 700 / 710))
    assert {name for name, reading in readings.items() if "paper" in reading} == {
        "memory", "reward FLOPs", "optimisation FLOPs",
    }  # fmt: skip


def test_report_names_its_conventions_and_draws(tmp_path, monkeypatch, capsys):
    costs = made_up_costs()
    text = report(RUN, costs, None, "", None)
    for part in ("1024 x 1024 pixels, batch 1, 205 text tokens", "VAE's decoder", "2.5 times", "71.1"):
        assert part in " ".join(text.split()), part
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")]
        for line in text.splitlines()
        if "|" in line
    }
    # an update of 20 TFLOP and 40 ms beside a rollout of 690 TFLOP and 34.5 x 40 ms
    assert rows["refl: HPSv3 (pixel)"][3:] == ["20.0", "710.0", "50.0 %", "1.4 %", "40", "1420", "1.4 %", ""]
    assert rows["refl (gradient part): HPSv3 (pixel)"][-3:-1] == ["710.0", "1.4 %"]
    assert rows["batch 4"][2:] == ["6.12", "+0.00", "40.0", "+300.0 %", "2800.0", "+300.0 %", ""]
    assert all(name in text for name in economies(RUN.base))
    data = json.loads(json.dumps(to_json(RUN, costs, None, "", None)))
    assert len(data["cases"]) == len(costs) and data["savings_percent"]["memory"]["paper"] == 51.4
    draw_costs(RUN, costs, tmp_path / "savings.png")
    assert (tmp_path / "savings.png").stat().st_size > 10_000
    (tmp_path / "savings.json").write_text(json.dumps(data))
    targets = Path(__file__).parents[3] / "examples" / "evidence" / "savings_targets.py"
    monkeypatch.setattr(sys, "argv", [str(targets), str(tmp_path / "savings.json")])
    runpy.run_path(str(targets), run_name="__main__")
    assert capsys.readouterr().out.count(" met |") == 3  # 6.1 of 6.5 and of 10 GiB, 2 of 4.2; not of 4.5, not of 0.7
    for stacked in stacks(RUN, costs)[:2]:
        total = 2**30 * sum(stacked["dinalrm"].values())
        assert total == pytest.approx(costs[RUN.base].memory)


def test_measurements_stand_beside_the_prediction():
    """4 GiB counted, 5 measured: 20 % too low. 10 TFLOP in 100 ms are 100 TFLOP/s, a quarter of the card's 400."""
    case, other = Case(), Case(work="grpo")
    cost = Cost(2**32, 0, 0, 10**13, 10**13, 10**12, 0)
    text = measured_table({case: cost, other: cost}, {case: Measured(5 * 2**30, 6 * 2**30, 100.0), other: "out"}, 400.0)
    row = " ".join(text.splitlines()[2].split())
    assert row == "| refl dinalrm | 4.00 | 5.00 | -20.0 % | 6.00 | 100.0 | 10.00 | 100.0 | 25.0 % |"
    assert "grpo dinalrm" in text and "out" in text


def test_measuring_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["savings.py", "--measure"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert ended.value.code == 2 and "measure: got true" in capsys.readouterr().err


def test_the_rollout_is_that_of_the_recipe():
    earliest = read_yaml(RECIPE.with_name("refl_sd35.yaml"), "settings")["refl"]["earliest"]
    steps = MODELS["sd35"].num_steps
    assert (round(earliest * steps), steps - 1) == ROLLOUT_STEPS and MODELS["sd35"].guidance_scale > 1


@pytest.mark.gpu
@pytest.mark.parametrize("reward", ["dinalrm", "pickscore", "hpsv3"])
def test_measured_on_cuda_near_the_prediction(reward):
    case = Case(reward=reward, work="gradient", size=512)
    cost, found = count(case, FULL), measure(case, FULL, warmup=1, repeats=2)
    assert cost.memory == pytest.approx(found.memory, rel=0.1)


@pytest.mark.parametrize("change", [{"size": 1000}, {"batch": 0}, {"levels": 9}, {"text_length": 0}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(RUN, **change)


@pytest.mark.extra
def test_packed_layers_compute_what_bitsandbytes_packed():
    """The layer that is counted computes with real weights, too, so that --measure covers nf4."""
    functional = pytest.importorskip("bitsandbytes").functional
    linear = torch.nn.Linear(128, 64, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4")
    layer = PackedLinear(linear, "nf4")
    expected_scales = layer.scales.shape
    layer.weight, layer.scales = torch.nn.Parameter(packed.flatten(), requires_grad=False), state.absmax
    inputs = torch.randn(5, 128, dtype=torch.bfloat16, requires_grad=True)
    layer(inputs).sum().backward()
    weight = functional.dequantize_4bit(packed, state)
    assert state.absmax.shape == expected_scales and (weight - linear.weight).abs().max() < 0.02
    assert torch.equal(layer(inputs), torch.nn.functional.linear(inputs, weight, linear.bias))
    assert torch.equal(inputs.grad, torch.ones(5, 64, dtype=torch.bfloat16) @ weight)
