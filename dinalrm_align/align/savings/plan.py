"""Which cases `recipes/savings.py` weighs, and counting or measuring all of them."""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from tqdm import tqdm

from dinalrm_align.align.savings.architectures import FULL, Architecture
from dinalrm_align.align.savings.case import Case
from dinalrm_align.align.savings.config import SavingsRun
from dinalrm_align.align.savings.count import Cost, count
from dinalrm_align.align.savings.measure import Measured, measure

REWARDS = ("dinalrm", "pickscore", "hpsv3")
PARTS = ("policy_forward", "policy_gradient", "vae_encode", "vae_decode", "vae_gradient")


def base_case(run: SavingsRun) -> Case:
    return Case(size=run.size, batch=run.batch, text_length=run.text_length, levels=run.levels)


def without_recomputing(case: Case) -> Case:
    return case.but(policy_checkpointing=False, reward_checkpointing=False)


def parts(base: Case) -> list[Case]:
    """The networks one by one, activations kept."""
    plain = without_recomputing(base)
    networks = [plain.but(work=work) for work in PARTS]
    latent = [plain.but(work="score"), plain.but(work="gradient")]
    pictures = [plain.but(reward=reward, work=work) for reward in REWARDS[1:] for work in ("pixels", "pixels_gradient")]
    return [*networks, *latent, *pictures]


def scenarios(base: Case) -> list[Case]:
    """Every reward at every work: with blocks recomputed and, where there is a backward pass to ReFL's end, without."""
    found = [base.but(reward=reward, work="score") for reward in REWARDS]
    for work in ("gradient", "refl"):
        for case in (without_recomputing(base), base):
            found += [case.but(reward=reward, work=work) for reward in REWARDS]
    return found + [base.but(reward=reward, work="grpo") for reward in REWARDS]


def economies(base: Case) -> dict[str, Case]:
    """One ReFL update with the latent reward, and with HPSv3, under one option more or less, by name."""
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
    """Everything that is weighed, each once; the costly ones first, so that workers end together."""
    base = base_case(run)
    found = [*scenarios(base), *parts(base), *(economies(base).values() if run.economies else [])]
    return sorted(dict.fromkeys(found), key=lambda case: (not case.trains, case.batch == base.batch))


def count_all(cases: Sequence[Case], *, workers: int, architecture: Architecture = FULL) -> dict[Case, Cost]:
    """The cost of each case, counted in as many processes."""
    if workers == 1:
        return {case: count(case, architecture) for case in tqdm(cases, desc="counted", dynamic_ncols=True)}
    context, costs = multiprocessing.get_context("spawn"), {}
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(count, case, architecture): case for case in cases}
        for future in tqdm(as_completed(futures), total=len(futures), desc="counted", dynamic_ncols=True):
            costs[futures[future]] = future.result()
    return costs


def measure_all(
    cases: Sequence[Case],
    device: str,
    *,
    warmup: int,
    repeats: int,
    architecture: Architecture = FULL,
) -> dict[Case, Measured | str]:
    """Each case that can be run on `device`, run there; of the others the reason: no room, or quantised weights."""
    import torch

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


def paper_readings(base: Case, costs: Mapping[Case, Cost]) -> dict[str, dict[str, float]]:
    """DiNa-LRM's published savings against HPSv3 (arXiv 2602.11146), by name: the paper's and what is counted here
    against HPSv3 and PickScore, in percent.

    Memory is that of a ReFL update in which nothing is recomputed; reward FLOPs those of scoring, the VAE's decoder
    charged to the pixel reward; optimisation FLOPs those and one policy step, forward only: the reading that comes
    nearest to the paper's numbers. `optimisation executed` is what an update executes, backward passes included.
    """
    plain = without_recomputing(base)
    policy = costs[plain.but(work="policy_forward")].f2

    def saved(value) -> dict[str, float]:
        return {other: percent_saved(value("dinalrm"), value(other)) for other in ("hpsv3", "pickscore")}

    return {
        "memory": {"paper": 51.4, **saved(lambda reward: costs[plain.but(reward=reward, work="refl")].memory)},
        "memory, everything recomputed": saved(lambda reward: costs[base.but(reward=reward, work="refl")].memory),
        "reward FLOPs": {"paper": 71.1, **saved(lambda reward: costs[base.but(reward=reward, work="score")].f2)},
        "reward MACs without attention": saved(lambda reward: costs[base.but(reward=reward, work="score")].m0),
        "optimisation FLOPs": {
            "paper": 46.4,
            **saved(lambda reward: policy + costs[base.but(reward=reward, work="score")].f2),
        },
        "optimisation FLOPs, executed": saved(lambda reward: costs[plain.but(reward=reward, work="refl")].f2),
    }
