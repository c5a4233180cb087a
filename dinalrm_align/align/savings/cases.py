"""The cases that `recipes/savings.py` counts or measures, and the savings derived from them."""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from tqdm import tqdm

from dinalrm_align.align.savings.config import FULL, Architecture, Case, SavingsRun
from dinalrm_align.align.savings.cost import Cost, Measured, count, measure

REWARDS = ("dinalrm", "pickscore", "hpsv3")
ROLLOUT_STEPS = (30, 39)
"""First and last gradient step of ReFL on SD3.5 Medium (recipes/refl_sd35.yaml): as many guided steps come before."""


def base_case(run: SavingsRun) -> Case:
    return Case(size=run.size, batch=run.batch, text_length=run.text_length, levels=run.levels)


def without_recomputing(case: Case) -> Case:
    return case.but(policy_checkpointing=False, reward_checkpointing=False)


def parts(base: Case) -> list[Case]:
    """Each network alone, without recomputation."""
    plain = without_recomputing(base)
    works = ("policy_forward", "policy_gradient", "vae_encode", "vae_decode", "vae_gradient", "score", "gradient")
    pixel = [plain.but(reward=reward, work=work) for reward in REWARDS[1:] for work in ("pixels", "pixels_gradient")]
    return [plain.but(work=work) for work in works] + pixel


def scenarios(base: Case) -> list[Case]:
    """Every reward with every workload; "gradient" and "refl" both without and with recomputation."""
    variants = [("score", base), *((work, case) for work in ("gradient", "refl")
                for case in (without_recomputing(base), base)), ("grpo", base)]  # fmt: skip
    return [case.but(reward=reward, work=work) for work, case in variants for reward in REWARDS]


def economies(base: Case) -> dict[str, Case]:
    """The gradient part of a ReFL update with the latent reward, and with HPSv3, with one option changed, by name."""
    refl, hpsv3, more = base.but(work="refl"), base.but(work="refl", reward="hpsv3"), 4 * base.batch
    return {
        "as above, latent reward": refl,
        "without recomputing the policy (--gradient_checkpointing false)": refl.but(policy_checkpointing=False),
        "--memory.base_quant int8": refl.but(base_quant="int8"),
        "--memory.base_quant nf4": refl.but(base_quant="nf4"),
        "--optim.name adamw8bit": refl.but(optimizer="adamw8bit"),
        "reward with a private copy, LoRA merged": refl.but(merged=True),
        f"batch {more}": refl.but(batch=more),
        "as above, HPSv3": hpsv3,
        "HPSv3, VAE in float32 (the recipes' default)": hpsv3.but(vae_dtype="float32"),
        "HPSv3, --hpsv3.quantization nf4, --memory.base_quant nf4": hpsv3.but(base_quant="nf4", reward_quant="nf4"),
        f"HPSv3, batch {more}, --memory.decode_slice 1": hpsv3.but(batch=more, decode_slice=1),
    }


def all_cases(run: SavingsRun) -> list[Case]:
    """Every case once, the costly ones first, so that workers finish together."""
    base = base_case(run)
    found = [*scenarios(base), *parts(base), *(economies(base).values() if run.economies else [])]
    return sorted(dict.fromkeys(found), key=lambda case: (not case.trains, case.batch == base.batch))


def count_all(cases: Sequence[Case], *, workers: int, architecture: Architecture = FULL) -> dict[Case, Cost]:
    """Count every case in `workers` processes."""
    if workers == 1:
        return {case: count(case, architecture) for case in tqdm(cases, desc="counted", dynamic_ncols=True)}
    context, costs = multiprocessing.get_context("spawn"), {}
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(count, case, architecture): case for case in cases}
        for future in tqdm(as_completed(futures), total=len(futures), desc="counted", dynamic_ncols=True):
            costs[futures[future]] = future.result()
    return costs


def measure_all(
    cases: Sequence[Case], device: str, *, warmup: int, repeats: int, architecture: Architecture = FULL
) -> dict[Case, Measured | str]:
    """Measure every case on `device`; the reason for those that cannot run: out of memory, or quantised weights."""
    found: dict[Case, Measured | str] = {}
    for case in tqdm(cases, desc="measured", dynamic_ncols=True):
        try:
            found[case] = measure(case, architecture, device, warmup=warmup, repeats=repeats)
        except torch.OutOfMemoryError:
            found[case] = "out of memory"
        except ValueError as error:
            if case.base_quant == case.reward_quant == "none":
                raise
            found[case] = str(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def percent_saved(part: float, whole: float) -> float:
    """How much less `part` is than `whole`, in percent."""
    return 100 * (1 - part / whole)


def rollout_operations(base: Case, costs: Mapping[Case, Cost]) -> float:
    """F2 of the mean rollout before ReFL's gradient step: guided steps are two forward passes of the policy."""
    return 2 * sum(ROLLOUT_STEPS) / 2 * costs[without_recomputing(base).but(work="policy_forward")].f2


def paper_readings(base: Case, costs: Mapping[Case, Cost]) -> dict[str, dict[str, float]]:
    """DiNa-LRM's published savings against HPSv3 (arXiv 2602.11146), by name: the paper's and those counted here
    against HPSv3 and PickScore, in percent.

    Memory is that of the gradient part of a ReFL update without recomputation. Reward FLOPs are those of scoring,
    including the VAE's decoder for pixel rewards; optimisation FLOPs add one policy forward pass, the reading closest
    to the paper's numbers. "executed" is the whole gradient part, with backward passes.
    """
    plain = without_recomputing(base)
    policy, rollout = costs[plain.but(work="policy_forward")].f2, rollout_operations(base, costs)

    def saved(value) -> dict[str, float]:
        return {other: percent_saved(value("dinalrm"), value(other)) for other in ("hpsv3", "pickscore")}

    def update(case: Case, reward: str) -> Cost:
        return costs[case.but(reward=reward, work="refl")]

    def score(reward: str) -> Cost:
        return costs[base.but(reward=reward, work="score")]

    return {
        "memory": {"paper": 51.4, **saved(lambda reward: update(plain, reward).memory)},
        "memory, everything recomputed": saved(lambda reward: update(base, reward).memory),
        "reward FLOPs": {"paper": 71.1, **saved(lambda reward: score(reward).f2)},
        "reward MACs without attention": saved(lambda reward: score(reward).m0),
        "optimisation FLOPs": {"paper": 46.4, **saved(lambda reward: policy + score(reward).f2)},
        "optimisation FLOPs, executed": saved(lambda reward: update(plain, reward).f2),
        "optimisation FLOPs, executed, with the rollout": saved(lambda reward: rollout + update(plain, reward).f2),
    }
