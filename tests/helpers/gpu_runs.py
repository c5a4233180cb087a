"""Every recipe on the fake GPU in bfloat16, on a tiny world: runs of seconds, and the host's waits of one update."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from accelerate import Accelerator
from fake_gpu import FakeGpu
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from paths import load_recipe
from tiny_clip import save_clip
from tiny_recipes import make_world, stand_in

ON_GPU = ("--device=cuda", "--dtype=bfloat16")
ALIGN = (
    *ON_GPU, "--policy.rank=2", "--optim.lr=0.01", "--loop.checkpoint_every=0", "--evaluation.samples=2",
    "--evaluation.every=0", "--evaluation.num_steps=1", "--watch.sigmas=[0.2,0.4]", "--watch.drift_sigmas=[0.5]",
)  # fmt: skip
REFL = ("--refl.batch_size=1", "--refl.num_steps=2")
GROUPS = ("groups=2", "group_size=2", "num_steps=3")
GRPO = (*(f"--grpo.{each}" for each in GROUPS), "--grpo.window_range=[0,2]", "--grpo.guidance_scale=2")
NFT = (*(f"--nft.{each}" for each in GROUPS), "--nft.old_slope=0.2")
LPO = (
    "--lpo.batch_size=1", "--lpo.candidates=2", "--lpo.num_steps=3", "--lpo.steps=[0,2]", "--lpo.threshold=[0,0]",
)  # fmt: skip
DPO = ("--dpo.batch_size=1", "--dpo.group_size=2", "--dpo.num_steps=2", "--dpo.refresh_every=2")

WAITS: dict[str, tuple[str, Sequence[str]]] = {
    "refl, kl_weight 0": ("refl_sd35", (*REFL, "--refl.kl_weight=0")),
    "refl": ("refl_sd35", REFL),
    "refl, pixel": ("refl_sd35", (*REFL, "--reward=pixel", "--refl.kl_unit=raw")),
    "dpo": ("dpo_sd35", DPO),
    "grpo": ("grpo_sd35", GRPO),
    "lpo": ("lpo_sd35", LPO),
    "nft": ("nft_sd35", NFT),
}
"""Runs whose waits per update stand in `fixtures/host_waits.json`: two micro-steps an update."""


@dataclass
class World:
    """A folder for the model, `--model`, with latent and pixel reward, pairs and prompts, and for the runs' output."""

    folder: Path
    made: Counter = field(default_factory=Counter)

    @classmethod
    def make(cls, folder: Path) -> "World":
        make_world(folder)
        save_clip(folder / "pixel", side=64, patch=16)
        return cls(folder)

    @property
    def model(self) -> str:
        return f"--model={self.folder}"

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(f"--{name}={self.folder / 'prompts.txt'}" for name in ("prompts", "eval_prompts"))

    def output(self, name: str) -> Path:
        self.made[name] += 1
        return self.folder / "runs" / f"{name}_{self.made[name]}"

    def align(self, recipe: str, *options: str, gpu: FakeGpu) -> Path:
        """Train with a recipe for two updates; return the folder of the run."""
        folder = self.output(recipe)
        words = (self.model, *self.prompts, *ALIGN, "--loop.steps=2", f"--output_dir={folder}", *options)
        with gpu:
            load_recipe(recipe).main(words)
        return folder


@contextmanager
def no_figures() -> Iterator[None]:
    """Leave out drawing, most of the time of a short run."""
    with ExitStack() as stack:
        for owner, name, value in (
            (Figure, "savefig", stand_in),
            (Figure, "tight_layout", lambda figure, **options: None),
            (FigureCanvasAgg, "print_png", stand_in),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


def waits_of_an_update(world: World, name: str) -> tuple[FakeGpu, Counter, Counter]:
    """Run three updates of `WAITS[name]`. Return the GPU, and the waits and uploads of the second update by place.

    The second update is what was counted between the metrics of update 1 and those of update 2. It has no set-up, no
    evaluation, no checkpoint, and no first call.
    """
    recipe, options = WAITS[name]
    gpu, at = FakeGpu(), {}

    def log(accelerator: Accelerator, values: dict, step: int | None = None, **options: object) -> None:
        at[step] = gpu.waits.copy(), gpu.uploads.copy()

    with patch.object(Accelerator, "log", log):
        world.align(recipe, *options, "--loop.steps=3", "--loop.accumulate=2", gpu=gpu)
    return gpu, at[2][0] - at[1][0], at[2][1] - at[1][1]
