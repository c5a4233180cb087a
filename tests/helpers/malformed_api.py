"""Calls of the public functions that cannot be meant."""

import math

import numpy as np
import torch
from malformed import Case, World, latents, spoilt
from PIL import Image

from dinalrm_align.models.text import Conditions

NAN, INF = math.nan, math.inf
TEXT = {"prompt_embeds": latents(2, 5, 32), "pooled_prompt_embeds": latents(2, 32)}
CONDITIONS = Conditions(["", ""], **TEXT)


def score(**changes):
    """A call of the reward with some arguments replaced; ... leaves one out."""
    arguments = {"latents": latents(), **TEXT, "noise": latents(), **changes}
    return lambda world: world.reward(**{name: value for name, value in arguments.items() if value is not ...})


def prompted(prompts, **changes):
    return score(prompt_embeds=..., pooled_prompt_embeds=..., prompts=prompts, **changes)


def pictures(images, prompts=("a", "b"), **options):
    return lambda world: world.reward.score_images(images, list(prompts), **options)


def clip(**changes):
    arguments = {"latents": latents(), "prompts": ["a", "b"], **changes}
    return lambda world: world.clip(**{name: value for name, value in arguments.items() if value is not ...})


def config(kind: str, name: str, **values):
    """The construction of a dataclass of settings, by module and name."""

    def build(world: World) -> object:
        import importlib

        return vars(importlib.import_module(f"dinalrm_align.config.{kind}"))[name](**values)

    return build


def of(module: str, function: str, *arguments, **options):
    """A call of a function of the package; arguments that are functions are given the World."""

    def call(world: World) -> object:
        import importlib

        given = [argument(world) if callable(argument) else argument for argument in arguments]
        named = {name: value(world) if callable(value) else value for name, value in options.items()}
        return vars(importlib.import_module(f"dinalrm_align.{module}"))[function](*given, **named)

    return call


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 64), **options) -> Image.Image:
    return Image.new(mode, size, **options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LATENTS = [
    Case("rank 3", score(latents=latents(16, 8, 8)), ValueError, "(B, C, H, W)"),
    Case("rank 5", score(latents=latents(1, 2, 16, 8, 8)), ValueError, "(B, C, H, W)"),
    Case("no samples", score(latents=latents(0, 16, 8, 8)), ValueError, "at least one"),
    Case("4 channels", score(latents=latents(2, 4, 8, 8)), ValueError, "got 4 channels, the backbone takes 16"),
    Case("odd height", score(latents=latents(2, 16, 7, 8)), ValueError, "multiples of the patch size 2"),
    Case("odd width", score(latents=latents(2, 16, 8, 9)), ValueError, "multiples of the patch size 2"),
    Case("no height", score(latents=latents(2, 16, 0, 8)), ValueError, "height x width 0 x 8"),
    Case("too wide", score(latents=latents(2, 16, 8, 50)), ValueError, "at most 48 x 48"),
    Case("integers", score(latents=latents(dtype=torch.int64)), ValueError, "torch.int64"),
    Case("bytes", score(latents=latents(dtype=torch.uint8)), ValueError, "torch.uint8"),
    Case("truth values", score(latents=latents(dtype=torch.bool)), ValueError, "torch.bool"),
    Case("complex", score(latents=latents(dtype=torch.complex64)), ValueError, "torch.complex64"),
    Case("float8", score(latents=latents(dtype=torch.float8_e4m3fn)), ValueError, "float8_e4m3fn"),
    Case("sparse", score(latents=latents().to_sparse()), ValueError, "expected at least one, floating"),
    Case("on meta", score(latents=latents(device="meta")), ValueError, "latents are on meta, the reward is on cpu"),
    Case("NaN", score(latents=spoilt(latents(), NAN)), ValueError, "1 of 2048 values are NaN or infinite"),
    Case("infinity", score(latents=spoilt(latents(), INF)), ValueError, "1 of 2048 values are NaN or infinite"),
    Case("-infinity", score(latents=spoilt(latents(), -INF)), ValueError, "1 of 2048 values"),
    Case("a list", score(latents=[[0.0]]), TypeError, "latents: got list"),
    Case("an array", score(latents=np.zeros((2, 16, 8, 8))), TypeError, "latents: got ndarray"),
    Case("a picture", score(latents=picture()), TypeError, "score_images takes pictures"),
    Case("nothing", score(latents=None), TypeError, "latents: got NoneType"),
    Case("an unknown argument", score(timestep=400), TypeError, "timestep", by_signature=True),
    Case("left out", score(latents=...), TypeError, "latents", by_signature=True),
]  # fmt: skip

PROMPTS = [
    Case("one for two", prompted(["a"]), ValueError, "got 2 latents, 1 prompts"),
    Case("a string for two", prompted("a"), ValueError, "got 2 latents, 1 prompts"),
    Case("three for two", prompted(["a", "b", "c"]), ValueError, "got 2 latents, 3 prompts"),
    Case("none", prompted([]), ValueError, "prompts: got none"),
    Case("a number among them", prompted(["a", 3]), TypeError, "prompts: got int 3"),
    Case("nothing among them", prompted(["a", None]), TypeError, "prompts: got NoneType"),
    Case("bytes among them", prompted(["a", b"b"]), TypeError, "prompts: got bytes"),
    Case("bytes", prompted(b"ab"), TypeError, "prompts: got int"),
    Case("lists among them", prompted([["a"], ["b"]]), TypeError, "prompts: got list"),
    Case("a set", prompted({"a", "b"}), TypeError, "prompts: got set"),
    Case("a number", prompted(3), TypeError, "prompts: got int 3"),
    Case("a million characters", prompted(["a", "b" * 1_000_000]), ValueError, "got 1000000 characters at 1"),
    Case("neither form", prompted(None), ValueError, "got neither prompts nor embeddings"),
    Case("both forms", score(prompts=["a", "b"]), ValueError, "got both prompts and embeddings"),
    Case("one form and a half", score(prompts=["a", "b"], prompt_embeds=...), ValueError, "got both prompts"),
    Case("without pooled", score(pooled_prompt_embeds=...), ValueError, "without pooled_prompt_embeds"),
    Case("pooled alone", score(prompt_embeds=...), ValueError, "without prompt_embeds"),
]  # fmt: skip

EMBEDDINGS = [
    Case("rank 2", score(prompt_embeds=latents(2, 32)), ValueError, "prompt_embeds: got (2, 32)"),
    Case("of three", score(prompt_embeds=latents(3, 5, 32)), ValueError, "2 latents, 3 prompt_embeds"),
    Case("narrow", score(prompt_embeds=latents(2, 5, 30)), ValueError, "prompt_embeds: got width 30"),
    Case("without tokens", score(prompt_embeds=latents(2, 0, 32)), ValueError, "no tokens"),
    Case("NaN", score(prompt_embeds=spoilt(latents(2, 5, 32), NAN)), ValueError, "prompt_embeds: 1 of 320 values"),
    Case("integers", score(prompt_embeds=latents(2, 5, 32).long()), ValueError, "prompt_embeds: got (2, 5, 32) of torch.int64"),
    Case("on meta", score(prompt_embeds=latents(2, 5, 32, device="meta")), ValueError, "prompt_embeds: got a tensor on meta"),
    Case("a list", score(prompt_embeds=[1.0]), ValueError, "prompt_embeds: got list"),
    Case("pooled of rank 3", score(pooled_prompt_embeds=latents(2, 1, 32)), ValueError, "pooled_prompt_embeds: got (2, 1, 32)"),
    Case("pooled of one", score(pooled_prompt_embeds=latents(1, 32)), ValueError, "2 latents, 1 pooled_prompt_embeds"),
    Case("pooled narrow", score(pooled_prompt_embeds=latents(2, 31)), ValueError, "pooled_prompt_embeds: got width 31"),
    Case("pooled infinite", score(pooled_prompt_embeds=spoilt(latents(2, 32), INF)), ValueError, "pooled_prompt_embeds: 1 of 64"),
    Case("pooled complex", score(pooled_prompt_embeds=latents(2, 32) * 1j), ValueError, "of torch.complex64"),
]  # fmt: skip

SIGMA = [
    Case("below 0", score(sigma=-0.1), ValueError, "sigma: got -0.1, outside [0, 1]"),
    Case("a timestep", score(sigma=400), ValueError, "a timestep is 1000 sigma"),
    Case("above 1", score(sigma=1.0001), ValueError, "outside [0, 1]"),
    Case("NaN", score(sigma=NAN), ValueError, "sigma: got nan"),
    Case("infinity", score(sigma=INF), ValueError, "sigma: got inf"),
    Case("no levels", score(sigma=()), TypeError, "expected a float"),
    Case("one level wrong", score(sigma=(0.2, 1.2)), ValueError, "sigma: got 1.2"),
    Case("one level NaN", score(sigma=[0.2, NAN]), ValueError, "sigma: got nan"),
    Case("text", score(sigma="0.4"), TypeError, "sigma: got '0.4'"),
    Case("truth", score(sigma=True), TypeError, "sigma: got True"),
    Case("truth among levels", score(sigma=(0.2, True)), TypeError, "sigma: got"),
    Case("nested", score(sigma=((0.2, 0.3), 0.4)), TypeError, "sigma: got"),
    Case("tensors in a list", score(sigma=[torch.tensor([0.2, 0.3])]), TypeError, "sigma: got"),
    Case("complex", score(sigma=0.4j), TypeError, "sigma: got"),
    Case("three for two", score(sigma=torch.tensor([0.1, 0.2, 0.3])), ValueError, "sigma: got a tensor of shape (3,)"),
    Case("rank 2", score(sigma=torch.full((2, 2), 0.4)), ValueError, "sigma: got a tensor of shape (2, 2)"),
    Case("truth tensor", score(sigma=torch.tensor([True, False])), TypeError, "sigma: got"),
    Case("complex tensor", score(sigma=torch.tensor([0.4j, 0.4j])), TypeError, "sigma: got"),
    Case("tensor with NaN", score(sigma=torch.tensor([0.4, NAN])), ValueError, "sigma: got nan"),
    Case("tensor on meta", score(sigma=torch.zeros(2, device="meta")), ValueError, "on meta"),
    Case("number on meta", score(sigma=torch.zeros((), device="meta")), ValueError, "on meta"),
    Case("a dictionary", score(sigma={0.4}), TypeError, "sigma: got"),
]  # fmt: skip

NOISE = [
    Case("of one", score(noise=latents(1, 16, 8, 8)), ValueError, "noise: got (1, 16, 8, 8); expected the latents'"),
    Case("two draws for one level", score(noise=latents(2, 2, 16, 8, 8)), ValueError, "one draw per level"),
    Case("two draws for three levels", score(noise=latents(2, 2, 16, 8, 8), sigma=(0.2, 0.5, 0.7)), ValueError, "(3, 2, 16, 8, 8)"),
    Case("integers", score(noise=latents(dtype=torch.int32)), ValueError, "of torch.int32"),
    Case("truth values", score(noise=latents(dtype=torch.bool)), ValueError, "of torch.bool"),
    Case("complex", score(noise=latents(dtype=torch.complex64)), ValueError, "of torch.complex64"),
    Case("NaN", score(noise=spoilt(latents(), NAN)), ValueError, "noise: 1 of 2048 values"),
    Case("on meta", score(noise=latents(device="meta")), ValueError, "on meta"),
    Case("a seed", score(noise=7), ValueError, "noise: got int"),
    Case("and a generator", score(generator=generator()), ValueError, "got both noise and generator"),
    Case("generator: a seed", score(noise=..., generator=7), TypeError, "torch.Generator().manual_seed(seed)"),
    Case("generator: numpy's", score(noise=..., generator=np.random.default_rng(0)), TypeError, "generator: got Generator"),
    Case("generator: a list", score(noise=..., generator=[generator()]), TypeError, "generator: got list"),
]  # fmt: skip

PICTURES = [
    Case("a path", pictures("picture.png"), TypeError, "images: got str 'picture.png'"),
    Case("paths", pictures(["a.png", "b.png"]), TypeError, "images[0]: got str 'a.png'"),
    Case("bytes", pictures(b"PNG"), TypeError, "images: got bytes"),
    Case("arrays", pictures([np.zeros((64, 64, 3), np.uint8)] * 2), TypeError, "images[0]: got ndarray"),
    Case("an array", pictures(np.zeros((2, 64, 64, 3))), TypeError, "images: got ndarray"),
    Case("nothing", pictures(None), TypeError, "images: got NoneType"),
    Case("none", pictures([]), ValueError, "got 0 images"),
    Case("nothing among them", pictures([picture(), None]), TypeError, "images[1]: got NoneType"),
    Case("0 x 0 pixels", pictures([picture(size=(0, 0))] * 2), ValueError, "0 x 0 pixels"),
    Case("no height", pictures([picture(size=(64, 0))] * 2), ValueError, "64 x 0 pixels"),
    Case("two sizes", pictures([picture(), picture(size=(32, 64))]), ValueError, "expected one or more of one size"),
    Case("a size the VAE has not", pictures([picture(size=(63, 64))] * 2), ValueError, "multiples of"),
    Case("huge", pictures([picture(size=(256, 256))] * 2), ValueError, "expected at most 192: resize"),
    Case("16 bits", pictures([picture("I;16")] * 2), ValueError, "expected 8 bits per channel"),
    Case("32 bits", pictures([picture("I")] * 2), ValueError, "expected 8 bits per channel"),
    Case("floats", pictures([picture("F")] * 2), ValueError, "expected 8 bits per channel"),
    Case("transparent", pictures([picture("RGBA", color=(9, 9, 9, 100))] * 2), ValueError, "paste it on a background"),
    Case("transparent gray", pictures([picture("LA", color=(9, 0))] * 2), ValueError, "paste it on a background"),
    Case("byte tensor", pictures(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)), ValueError, "torch.uint8"),
    Case("bytes as floats", pictures(torch.full((2, 3, 64, 64), 255.0)), ValueError, "divide bytes by 255"),
    Case("in [-1, 1]", pictures(torch.full((2, 3, 64, 64), -1.0)), ValueError, "map [-1, 1]"),
    Case("NaN", pictures(torch.full((2, 3, 64, 64), NAN)), ValueError, "images: got values in [nan, nan]"),
    Case("rank 3", pictures(torch.zeros(3, 64, 64)), ValueError, "(B, 3, H, W)"),
    Case("channels last", pictures(torch.zeros(2, 64, 64, 3)), ValueError, "(B, 3, H, W)"),
    Case("gray tensor", pictures(torch.zeros(2, 1, 64, 64)), ValueError, "(B, 3, H, W)"),
    Case("empty tensor", pictures(torch.zeros(0, 3, 64, 64)), ValueError, "at least one"),
    Case("on meta", pictures(torch.zeros(2, 3, 64, 64, device="meta")), ValueError, "on meta"),
    Case("one prompt for two", pictures([picture()] * 2, ["a"]), ValueError, "got 2 latents, 1 prompts"),
    Case("wrong sigma", pictures([picture()] * 2, sigma=2.0), ValueError, "sigma: got 2"),
]  # fmt: skip

PIXEL_REWARD = [
    Case("no prompts", clip(prompts=...), ValueError, "reads prompts as text"),
    Case("embeddings for prompts", clip(prompts=..., **TEXT), ValueError, "mean nothing to it"),
    Case("a string for two", clip(prompts="ab"), ValueError, "got one string for 2 pictures"),
    Case("one prompt for two", clip(prompts=["a"]), ValueError, "got 1 prompts for 2 pictures"),
    Case("a number as prompt", clip(prompts=["a", 1]), TypeError, "prompts: got int 1"),
    Case("4 channels", clip(latents=latents(2, 4, 8, 8)), ValueError, "expected (B, 16, h, w)"),
    Case("rank 3", clip(latents=latents(16, 8, 8)), ValueError, "(B, C, H, W)"),
    Case("integers", clip(latents=latents(dtype=torch.int64)), TypeError, "latents: got torch.int64"),
    Case("no samples", clip(latents=latents(0, 16, 8, 8)), ValueError, "at least one sample"),
    Case("NaN", clip(latents=spoilt(latents(), NAN)), ValueError, "latents: 1 of 2048 values"),
    Case("a list", clip(latents=[1.0]), TypeError, "latents: got list"),
    Case("a path as picture", lambda w: w.clip.score_images(["a.png"], ["a"]), TypeError, "images[0]: got str"),
    Case("one picture, bare", lambda w: w.clip.score_images(picture(), ["a"]), TypeError, "expected a list of PIL"),
    Case("no pictures", lambda w: w.clip.score_images([], []), TypeError, "expected a list of PIL"),
    Case("bytes as floats", lambda w: w.clip.score_images(torch.full((1, 3, 64, 64), 255.0), ["a"]), ValueError, "divide bytes"),
    Case("an empty picture", lambda w: w.clip.score_images([picture(size=(0, 4))], ["a"]), ValueError, "0 x 4 pixels"),
    Case("two prompts for one picture", lambda w: w.clip.score_images([picture()], ["a", "b"]), ValueError, "got 2 prompts"),
]  # fmt: skip


def loaded(source=None, **options):
    from dinalrm_align import LatentReward

    return lambda w: LatentReward.from_pretrained(
        w.reward_dir if source is None else source, **{n: v(w) if callable(v) else v for n, v in options.items()}
    )


LOADING = [
    Case("unknown dtype", loaded(dtype="int8"), ValueError, "dtype: got 'int8'; known: float32"),
    Case("integer dtype", loaded(dtype=torch.int32), ValueError, "dtype: got torch.int32"),
    Case("unknown device", loaded(device="gpu"), ValueError, "device: got 'gpu'"),
    Case("device meta", loaded(device="meta"), ValueError, "hold no values"),
    Case("device that is not there", loaded(device="cuda:99"), ValueError, "CUDA GPU"),
    Case("the VAE as transformer", loaded(transformer=lambda w: w.pipeline.vae), TypeError, "got AutoencoderKL"),
    Case("another class as pipeline", loaded(pipeline=lambda w: w.pipeline.vae), TypeError, "pipeline: got AutoencoderKL"),
    Case("a path as pipeline", loaded(pipeline="pipeline"), TypeError, "pipeline: got str"),
    Case("nothing as source", loaded(3), TypeError, "reward: got int"),
    Case("format unknown", lambda w: w.reward.save_pretrained(w.fresh(), format="peft"), ValueError, "known: dinalrm, released"),
    Case("saved to nothing", lambda w: w.reward.save_pretrained(""), TypeError, "directory: got ''"),
    Case("saved to a number", lambda w: w.reward.save_pretrained(3), TypeError, "directory: got 3"),
    Case("saved to a file", lambda w: w.reward.save_pretrained(w.file("f", "x")), OSError, "cannot be a folder"),
    Case("saved below a file", lambda w: w.reward.save_pretrained(w.file("f", "x") / "r"), OSError, "cannot be a folder"),
]  # fmt: skip

X, V = latents(), latents()
ONE = torch.ones(2)

NOISE_FUNCTIONS = [
    Case("noise of another shape", of("noise", "add_noise", X, V[:1], 0.4), ValueError, "the shape of the latents"),
    Case("noise that is none", of("noise", "add_noise", X, 0.5, 0.4), TypeError, "noise: got float"),
    Case("integer latents", of("noise", "add_noise", X.long(), V, 0.4), TypeError, "latents: got torch.int64"),
    Case("latents of rank 3", of("noise", "add_noise", X[0], V[0], 0.4), ValueError, "(B, C, H, W)"),
    Case("sigma above 1", of("noise", "add_noise", X, V, 400.0), ValueError, "sigma: got 400"),
    Case("sigma NaN", of("noise", "add_noise", X, V, torch.tensor([NAN, 0.4])), ValueError, "expected [0, 1]"),
    Case("sigma of three", of("noise", "add_noise", X, V, torch.zeros(3)), ValueError, "3 values for 2 latents"),
    Case("sigma text", of("noise", "add_noise", X, V, "0.4"), TypeError, "sigma: got str"),
    Case("sigma truth", of("noise", "add_noise", X, V, True), TypeError, "sigma: got bool"),
    Case("sigma on meta", of("noise", "timestep_of", torch.zeros(2, device="meta")), TypeError, "holds values"),
    Case("sigma empty", of("noise", "timestep_of", torch.zeros(0)), TypeError, "holds values"),
    Case("timestep for sigma", of("noise", "timestep_of", torch.tensor([400.0])), ValueError, "expected [0, 1]"),
    Case("velocity of another shape", of("noise", "denoised", X, V[:, :4], 0.4), ValueError, "velocity: got shape"),
    Case("shift 0", of("noise", "shift_sigma", ONE, 0.0), ValueError, "shift: got 0"),
    Case("no timesteps", of("noise", "scheduler_sigmas", 0), ValueError, "num_train_timesteps: got 0"),
    Case("no table", of("noise", "snap_sigma", 0.4, torch.zeros(0)), ValueError, "table: got (0,)"),
    Case("negative seed", of("noise", "seeded_generator", -1), ValueError, "expected at least 0"),
    Case("fractional seed", of("noise", "seeded_generator", 0.5), TypeError, "expected an integer"),
    Case("unknown density", of("noise", "sample_sigma", "gauss", 4, generator=generator()), ValueError, "unknown sigma density"),
    Case("density of nothing", of("noise", "sample_sigma", None, 4, generator=generator()), TypeError, "pass a callable"),
    Case("no draws", of("noise", "sample_sigma", "uniform", 0, generator=generator()), ValueError, "n: got 0"),
    Case("density without generator", of("noise", "sample_sigma", "uniform", 4, generator=None), TypeError, "generator: got"),
    Case("beta of 0", of("noise", "sample_sigma", "beta", 4, generator=generator(), a=0.0), ValueError, "a: got 0.0; expected more than 0"),
    Case("mean NaN", of("noise", "sample_sigma", "logit_normal", 4, generator=generator(), mean=NAN), ValueError, "finite"),
    Case("constant 2", of("noise", "sample_sigma", "constant", 4, generator=generator(), value=2.0), ValueError, "[0, 1]"),
]  # fmt: skip


def loss(chosen=ONE, rejected=ONE, sigma=0.5 * ONE, label=1.0):
    from dinalrm_align.reward.loss_config import LossConfig

    return of("losses", "preference_loss", chosen, rejected, sigma, label, config=LossConfig())


LOSSES = [
    Case("scores of two lengths", loss(rejected=torch.ones(3)), ValueError, "must share one shape (N,)"),
    Case("sigma of another length", loss(sigma=torch.ones(3)), ValueError, "must share one shape (N,)"),
    Case("scores of rank 2", loss(*[torch.ones(2, 1)] * 3), ValueError, "must share one shape (N,)"),
    Case("no pairs", loss(*[torch.ones(0)] * 3), ValueError, "N at least 1"),
    Case("integer scores", loss(chosen=ONE.long()), TypeError, "score_chosen: got torch.int64"),
    Case("a list of scores", loss(chosen=[1.0, 1.0]), TypeError, "score_chosen: got list"),
    Case("sigma a number", loss(sigma=0.4), TypeError, "sigma: got float"),
    Case("sigma above 1", loss(sigma=400 * ONE), ValueError, "expected [0, 1]"),
    Case("sigma NaN", loss(sigma=NAN * ONE), ValueError, "expected [0, 1]"),
    Case("label above 1", loss(label=1.5), ValueError, "probabilities in [0, 1]"),
    Case("label NaN", loss(label=NAN * ONE), ValueError, "probabilities in [0, 1]"),
    Case("labels of three", loss(label=torch.ones(3)), ValueError, "label: got"),
    Case("label text", loss(label="chosen"), TypeError, "label: got str"),
    Case("config a dictionary", of("losses", "preference_loss", ONE, ONE, ONE, config={}), TypeError, "expected a LossConfig"),
]  # fmt: skip

SAMPLING = [
    Case("no steps", of("sampling", "schedule_sigmas", lambda w: w.pipeline.scheduler, 0), ValueError, "num_steps: got 0"),
    Case("half a step", of("sampling", "schedule_sigmas", lambda w: w.pipeline.scheduler, 2.5), TypeError, "num_steps: got"),
    Case("velocity of another shape", of("sampling", "ode_step", X, V[:1], 1.0, 0.5), ValueError, "velocity: got shape"),
    Case("sigma above 1", of("sampling", "ode_step", X, V, 1.5, 0.5), ValueError, "sigma: got 1.5"),
    Case("sigma NaN", of("sampling", "ode_step", X, V, 1.0, NAN), ValueError, "sigma_next: got nan"),
    Case("no levels", of("sampling", "rollout", lambda w: lambda x, s: x, X, []), ValueError, "falling levels"),
    Case("rising levels", of("sampling", "rollout", lambda w: lambda x, s: x, X, [0.0, 1.0]), ValueError, "falling levels"),
    Case("levels with NaN", of("sampling", "rollout", lambda w: lambda x, s: x, X, [1.0, NAN]), ValueError, "falling"),
    Case("no generators", of("sampling", "seeded_noise", (16, 8, 8), []), TypeError, "one torch.Generator per sample"),
    Case("seeds for generators", of("sampling", "seeded_noise", (16, 8, 8), [1, 2]), TypeError, "one torch.Generator"),
]  # fmt: skip


def velocity(**changes):
    def call(world: World) -> object:
        from dinalrm_align.models.text import Conditions

        conditions = Conditions(["a", "b"], **TEXT)
        arguments = {"latents": latents(), "sigma": 0.5, "conditions": conditions, **changes}
        return world.policy.velocity(**arguments)

    return call


def policy(transformer=None, lora=None, seed=0):
    def call(world: World) -> object:
        from dinalrm_align.align.policy import Policy
        from dinalrm_align.reward.config import LoraConfig

        return Policy(
            transformer(world) if transformer else world.policy.transformer, lora or LoraConfig(2, 2), seed=seed
        )

    return call


POLICY = [
    Case("the VAE", policy(lambda w: w.pipeline.vae), TypeError, "policy: got AutoencoderKL"),
    Case("a dictionary as config", policy(lora={"rank": 2}), TypeError, "expected diffusers' SD3Transformer2DModel and a"),
    Case("negative seed", policy(seed=-1), ValueError, "seed: got -1"),
    Case("a second one", policy(), ValueError, "takes no policy's adapter"),
    Case("rank 3", velocity(latents=latents(16, 8, 8)), ValueError, "(B, C, H, W)"),
    Case("4 channels", velocity(latents=latents(2, 4, 8, 8)), ValueError, "got 4 channels, the transformer takes 16"),
    Case("integers", velocity(latents=latents(dtype=torch.int64)), TypeError, "latents: got torch.int64"),
    Case("three latents", velocity(latents=latents(3, 16, 8, 8)), ValueError, "got 3 latents, 2 conditions"),
    Case("sigma above 1", velocity(sigma=500.0), ValueError, "sigma: got 500"),
    Case("guidance without negatives", velocity(guidance_scale=4.5), ValueError, "no negative conditions"),
    Case("guidance NaN", velocity(guidance_scale=NAN), ValueError, "guidance_scale: got nan"),
    Case("guidance below 0", velocity(guidance_scale=-1.0), ValueError, "guidance_scale: got -1"),
    Case("conditions of two lengths", of("policy", "Conditions", ["a"], **TEXT), ValueError, "one embedding per prompt"),
    Case("conditions of one string", of("policy", "Conditions", "ab", **TEXT), ValueError, "one embedding per prompt"),
    Case("embeddings of rank 2", of("policy", "Conditions", ["a", "b"], TEXT["pooled_prompt_embeds"], TEXT["pooled_prompt_embeds"]), TypeError, "expected a floating tensor (B, L, D)"),
    Case("saved to a file", lambda w: w.policy.save_lora(w.file("f", "x")), OSError, "cannot be a folder"),
]  # fmt: skip

ENCODING = [
    Case("prompts of no one", lambda w: w.reward.encoder([]), ValueError, "prompts: got none"),
    Case("a bare prompt", lambda w: w.reward.encoder("a circle"), TypeError, "expected a list of strings"),
    Case("4 channels decoded", of("encode", "decode_latents", lambda w: w.pipeline.vae, latents(2, 4, 8, 8)), ValueError, "the VAE has 16"),
    Case("a batch of no pairs", of("data.pairs", "PairBatch", X, CONDITIONS, chosen=torch.zeros(0).long(), rejected=torch.zeros(0).long(), label=torch.zeros(0), group=torch.zeros(2).long()), ValueError, "got no pairs"),
    Case("a batch with NaN", of("data.pairs", "PairBatch", spoilt(X, NAN), CONDITIONS, chosen=torch.tensor([0]), rejected=torch.tensor([1]), label=torch.ones(1), group=torch.zeros(2).long()), ValueError, "pair batch: latents"),
    Case("rows as floats", of("data.pairs", "PairBatch", X, CONDITIONS, chosen=torch.tensor([0.0]), rejected=torch.tensor([1]), label=torch.ones(1), group=torch.zeros(2).long()), TypeError, "chosen: got torch.float32"),
    Case("rows out of range", of("data.pairs", "PairBatch", X, CONDITIONS, chosen=torch.tensor([0]), rejected=torch.tensor([2]), label=torch.ones(1), group=torch.zeros(2).long()), ValueError, "pairs index pictures 0 to 1"),
]  # fmt: skip

BUILDING = [
    Case("config a dictionary", of("model", "build_reward_model", {}, lambda w: w.pipeline.transformer), TypeError, "RewardConfig"),
    Case("more layers than blocks", of("model", "build_reward_model", config("reward", "RewardConfig", num_layers=9, visual_taps=(1,), text_taps=(1,)), lambda w: w.pipeline.transformer), ValueError, "num_layers: got 9"),
    Case("heads that do not divide", of("head", "RewardHead", config("reward", "HeadConfig", num_attn_heads=5), 16, 1, 1), ValueError, "do not divide the width"),
]  # fmt: skip

SETTINGS = [
    Case("num_layers text", config("reward", "RewardConfig", num_layers="12"), TypeError, "num_layers: got str '12'; expected an integer"),
    Case("num_layers truth", config("reward", "RewardConfig", num_layers=True), TypeError, "num_layers: got bool"),
    Case("num_layers fraction", config("reward", "RewardConfig", num_layers=12.0), TypeError, "num_layers: got float"),
    Case("num_layers negative", config("reward", "RewardConfig", num_layers=-1), ValueError, "num_layers: got -1"),
    Case("no visual taps", config("reward", "RewardConfig", visual_taps=()), ValueError, "visual_taps"),
    Case("falling taps", config("reward", "RewardConfig", visual_taps=(8, 4)), ValueError, "visual_taps: got (8, 4)"),
    Case("tap beyond the layers", config("reward", "RewardConfig", text_taps=(4, 13)), ValueError, "num_layers = 12"),
    Case("tap of text", config("reward", "RewardConfig", text_taps=("4",)), TypeError, "text_taps[0]: got str"),
    Case("taps a number", config("reward", "RewardConfig", text_taps=4), TypeError, "text_taps: got int"),
    Case("sigma above 1", config("reward", "RewardConfig", sigma=1.4), ValueError, "sigma: got 1.4"),
    Case("sigma NaN", config("reward", "RewardConfig", sigma=NAN), ValueError, "sigma: got nan"),
    Case("sigma no levels", config("reward", "RewardConfig", sigma=()), ValueError, "sigma: got ()"),
    Case("image sigma text", config("reward", "RewardConfig", image_sigma="0.1"), TypeError, "image_sigma: got str"),
    Case("scale 0", config("reward", "RewardConfig", score_scale=0.0), ValueError, "score_scale: got 0"),
    Case("scale infinite", config("reward", "RewardConfig", score_scale=INF), ValueError, "score_scale: got inf"),
    Case("bias beyond floats", config("reward", "RewardConfig", score_bias=10**400), ValueError, "score_bias: got"),
    Case("text length 0", config("reward", "RewardConfig", text_length=0), ValueError, "text_length: got 0"),
    Case("text length endless", config("reward", "RewardConfig", text_length=10**9), ValueError, "at most 512"),
    Case("tuning unknown", config("reward", "RewardConfig", tuning="lara"), ValueError, "did you mean 'lora'?"),
    Case("tuning nothing", config("reward", "RewardConfig", tuning=None), ValueError, "known: lora, none, full"),
    Case("lora a dictionary", config("reward", "RewardConfig", lora={"rank": 4}), TypeError, "lora: got dict"),
    Case("snap a number", config("reward", "RewardConfig", snap_sigma=1), TypeError, "snap_sigma: got int 1; expected true or false"),
    Case("base model of nothing", config("reward", "RewardConfig", base_model_id=""), ValueError, "base_model_id"),
    Case("base model with NUL", config("reward", "RewardConfig", base_model_id="a\0b"), ValueError, "NUL"),
    Case("version of the future", config("reward", "RewardConfig", format_version=99), ValueError, "update dinalrm_align"),
    Case("unknown setting", config("reward", "RewardConfig", sigmas=(0.1,)), TypeError, "sigmas", by_signature=True),
    Case("rank 0", config("reward", "LoraConfig", rank=0), ValueError, "lora.rank: got 0"),
    Case("rank truth", config("reward", "LoraConfig", rank=True), TypeError, "lora.rank: got bool"),
    Case("alpha NaN", config("reward", "LoraConfig", alpha=NAN), ValueError, "lora.alpha: got nan"),
    Case("init unknown", config("reward", "LoraConfig", init="zeros"), ValueError, "lora.init: got 'zeros'"),
    Case("no queries", config("reward", "HeadConfig", num_queries=0), ValueError, "head.num_queries: got 0"),
    Case("dropout 1", config("reward", "HeadConfig", dropout=1.0), ValueError, "head.dropout: got 1.0"),
    Case("dropout text", config("reward", "HeadConfig", dropout="0.1"), TypeError, "head.dropout: got str"),
    Case("width that heads do not divide", config("reward", "HeadConfig", width=12), ValueError, "head.width: got 12"),
    Case("likelihood unknown", config("loss", "LossConfig", likelihood="thurston"), ValueError, "did you mean 'thurstone'"),
    Case("objective unknown", config("loss", "LossConfig", objective="hinge"), ValueError, "loss.objective: got 'hinge'"),
    Case("variance 0", config("loss", "LossConfig", variance=0.0), ValueError, "loss.variance: got 0.0"),
    Case("k NaN", config("loss", "LossConfig", k=NAN), ValueError, "loss.k: got nan"),
    Case("margin text", config("loss", "LossConfig", margin="1"), TypeError, "loss.margin: got str"),
    Case("density unknown", config("loss", "SigmaConfig", density="normal"), ValueError, "logit_normal"),
    Case("std below 0", config("loss", "SigmaConfig", std=-1.0), ValueError, "std: got -1.0"),
    Case("constant beyond 1", config("loss", "SigmaConfig", value=2.0), ValueError, "value: got 2.0"),
    Case("lr negative", config("loop", "OptimConfig", lr=-1e-3), ValueError, "optim: got lr -0.001"),
    Case("lr NaN", config("loop", "OptimConfig", lr=NAN), ValueError, "optim.lr: got nan"),
    Case("lr text", config("loop", "OptimConfig", lr="1e-4"), TypeError, "optim.lr: got str '1e-4'"),
    Case("beta 1", config("loop", "OptimConfig", beta1=1.0), ValueError, "beta1 1.0"),
    Case("eps 0", config("loop", "OptimConfig", eps=0.0), ValueError, "eps 0.0"),
    Case("decay share 0", config("loop", "OptimConfig", decay_share=0.0), ValueError, "decay_share"),
    Case("schedule unknown", config("loop", "OptimConfig", schedule="cosin"), ValueError, "did you mean 'cosine'"),
    Case("warm-up of half a step", config("loop", "OptimConfig", warmup_steps=0.5), TypeError, "optim.warmup_steps"),
    Case("no steps", config("loop", "LoopConfig", steps=0), ValueError, "steps 0"),
    Case("steps truth", config("loop", "LoopConfig", steps=True), TypeError, "loop.steps: got bool"),
    Case("ema 1", config("loop", "LoopConfig", ema_decay=1.0), ValueError, "ema_decay 1.0"),
    Case("ema NaN", config("loop", "LoopConfig", ema_decay=NAN), ValueError, "loop.ema_decay: got nan"),
    Case("keep nothing", config("loop", "LoopConfig", keep_last=0), ValueError, "keep_last 0"),
    Case("more gradient steps than steps", config("refl", "ReflConfig", num_steps=2, grad_steps=3), ValueError, "refl.grad_steps: got 3"),
    Case("earliest 2", config("refl", "ReflConfig", earliest=2.0), ValueError, "refl.earliest: got 2.0"),
    Case("KL NaN", config("refl", "ReflConfig", kl_weight=NAN), ValueError, "refl.kl_weight: got nan"),
    Case("guidance below 0", config("refl", "ReflConfig", guidance_scale=-2.0), ValueError, "refl.guidance_scale"),
    Case("no reward levels", config("refl", "ReflConfig", reward_sigma=[]), ValueError, "refl.reward_sigma"),
    Case("reward level 400", config("refl", "ReflConfig", reward_sigma=[400.0]), ValueError, "refl.reward_sigma"),
    Case("range of three", config("refl", "ReflConfig", reward_sigma_range=(0.1, 0.2, 0.3)), ValueError, "expected 2 values"),
    Case("range reversed", config("refl", "ReflConfig", reward_sigma_range=(0.7, 0.2)), ValueError, "low <= high"),
    Case("range with NaN", config("refl", "ReflConfig", reward_sigma_range=(0.1, NAN)), ValueError, "reward_sigma_range[1]"),
    Case("one sample", config("align", "EvaluationConfig", samples=1), ValueError, "evaluation.samples: got 1"),
    Case("more shown than sampled", config("align", "EvaluationConfig", samples=4, shown=5), ValueError, "evaluation.shown: got 5"),
    Case("evaluation seed -1", config("align", "EvaluationConfig", seed=-1), ValueError, "evaluation.seed: got -1"),
    Case("height 40", config("refl", "ReflRun", height=40), ValueError, "multiple of 16"),
    Case("policy a dictionary", config("refl", "ReflRun", policy={"rank": 4}), TypeError, "policy: got dict"),
    Case("no accuracy levels", config("train_reward", "AccuracyConfig", sigmas=[]), ValueError, "accuracy.sigmas: got []"),
    Case("accuracy level NaN", config("train_reward", "AccuracyConfig", sigmas=[NAN]), ValueError, "accuracy.sigmas[0]: got nan"),
    Case("full tuning in the recipe", lambda w: config("train_reward", "TrainRewardRun", reward=config("reward", "RewardConfig", tuning="full")(w))(w), ValueError, "reward.tuning"),
    Case("seed -1", config("train_reward", "TrainRewardRun", seed=-1), ValueError, "seed: got -1"),
    Case("batch of nothing", config("train_reward", "TrainRewardRun", batch_size=0), ValueError, "batch_size: got 0"),
    Case("picture of 63 pixels", config("shapes", "StackConfig", image_size=63), ValueError, "image_size 63"),
    Case("widths the norms do not divide", config("shapes", "StackConfig", vae_channels=(12,)), ValueError, "vae_channels"),
    Case("dual block beyond the depth", config("shapes", "StackConfig", dual_attention_layers=(9,)), ValueError, "dual_attention"),
    Case("depth text", config("shapes", "StackConfig", depth="6"), TypeError, "stack.depth: got str"),
    Case("emphasis on nothing known", config("shapes", "PairsConfig", emphasis={"color": 2.0}), ValueError, "did you mean 'colour'"),
    Case("emphasis 0", config("shapes", "PairsConfig", emphasis={"shape": 0.0}), ValueError, "pairs.emphasis.shape"),
    Case("one picture a caption", config("shapes", "PairsConfig", pictures=1), ValueError, "pairs.pictures: got 1"),
    Case("share above 1", config("shapes", "PairsConfig", sampled_share=1.5), ValueError, "sampled_share 1.5"),
    Case("build on a TPU", config("shapes", "BuildConfig", device="tpu"), ValueError, "device: got 'tpu'"),
    Case("not a dictionary", lambda w: vars_of_reward_config().from_dict([1]), TypeError, "reward config: got list"),
    Case("an empty dictionary", lambda w: vars_of_reward_config().from_dict({}), ValueError, "missing base_model_id"),
]  # fmt: skip


def vars_of_reward_config():
    from dinalrm_align import RewardConfig

    return RewardConfig


GROUPS = {
    "reward: latents": LATENTS,
    "reward: prompts": PROMPTS,
    "reward: embeddings": EMBEDDINGS,
    "reward: sigma": SIGMA,
    "reward: noise and generator": NOISE,
    "reward: pictures": PICTURES,
    "reward: loading and saving": LOADING,
    "pixel reward": PIXEL_REWARD,
    "noise": NOISE_FUNCTIONS,
    "losses": LOSSES,
    "sampling": SAMPLING,
    "policy": POLICY,
    "encoding and batches": ENCODING,
    "building models": BUILDING,
    "settings": SETTINGS,
}
