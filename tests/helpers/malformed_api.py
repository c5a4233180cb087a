"""Malformed calls of the public functions."""

import math
import pickle

import numpy as np
import torch
from malformed import Case, World, latents, with_value
from PIL import Image

from dinalrm_align import LatentReward, RewardConfig
from dinalrm_align.align.config import EvaluationConfig
from dinalrm_align.align.grpo_config import GrpoConfig
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.refl_config import ReflConfig, ReflRun
from dinalrm_align.align.spread import spread
from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.flow.noise import (
    add_noise,
    denoised,
    sample_sigma,
    scheduler_sigmas,
    seeded_generator,
    shift_sigma,
    snap_sigma,
    timestep_of,
)
from dinalrm_align.flow.sampling import ode_step, rollout, schedule_sigmas, seeded_noise
from dinalrm_align.models.pipeline import decode_latents
from dinalrm_align.models.specs import MODELS
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.config import AccuracyConfig, HeadConfig, LoraConfig, LossConfig, TrainRewardRun
from dinalrm_align.reward.head import RewardHead
from dinalrm_align.reward.losses import preference_loss
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.reward.pixel.unifiedreward import TEMPLATES, ChatEndpoint, UnifiedReward
from dinalrm_align.shapes.config import BuildConfig, PairsConfig, StackConfig
from dinalrm_align.train.config import LoopConfig, OptimConfig

NAN, INF = math.nan, math.inf
TEXT = {"prompt_embeds": latents(2, 5, 32), "pooled_prompt_embeds": latents(2, 32)}
CONDITIONS = Conditions(["", ""], **TEXT)


def score(**changes):
    """A call of the reward with some arguments replaced; ... removes one."""
    arguments = {"latents": latents(), **TEXT, "noise": latents(), **changes}
    return lambda world: world.reward(**{name: value for name, value in arguments.items() if value is not ...})


def prompted(prompts, **changes):
    return score(prompt_embeds=..., pooled_prompt_embeds=..., prompts=prompts, **changes)


def score_images(images, prompts=("a", "b"), **options):
    return lambda world: world.reward.score_images(images, list(prompts), **options)


def clip(**changes):
    arguments = {"latents": latents(), "prompts": ["a", "b"], **changes}
    return lambda world: world.clip(**{name: value for name, value in arguments.items() if value is not ...})


def lrm(**changes):
    arguments = {"latents": latents(2, 4, 8, 8), "timestep": 1, "prompts": ["a", "b"], **changes}
    return lambda world: world.lrm.score_timestep(**arguments)


def of(function, *arguments, **options):
    """A call of a function or class of the package; arguments that are functions are given the World."""

    def call(world: World) -> object:
        given = [argument(world) if callable(argument) else argument for argument in arguments]
        named = {name: value(world) if callable(value) else value for name, value in options.items()}
        return function(*given, **named)

    return call


def blank(mode: str = "RGB", size: tuple[int, int] = (64, 64), **options) -> Image.Image:
    return Image.new(mode, size, **options)


def turned() -> Image.Image:
    """An image of 32 x 64 pixels that says that it is to be shown as 64 x 32."""
    image = blank(size=(32, 64))
    image.getexif()[0x0112] = 6
    return image


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ROWS = list(latents())
SERVICE = [
    Case("no latents in a list", score(latents=[]), ValueError, "latents 0"),
    Case("latents of two sizes", score(latents=[ROWS[0], ROWS[1][:, :4]]), ValueError, "latents (16, 4, 8)"),
    Case("latents of two dtypes", score(latents=[ROWS[0], ROWS[1].half()]), ValueError, "latents float16"),
    Case("batches in a list", score(latents=[latents()]), ValueError, "latents (2, 16, 8, 8)"),
    Case("numbers in a list", score(latents=[1.0, 2.0]), TypeError, "latents[0] float"),
    Case("byte arrays", score(latents=np.zeros((2, 16, 8, 8), np.uint8)), ValueError, "latents uint8"),
    Case("object arrays", score(latents=np.zeros((2, 16, 8, 8), object)), ValueError, "latents object"),
    Case("noise of bytes", score(noise=np.zeros((2, 16, 8, 8), np.uint8)), ValueError, "noise uint8"),
    Case("one seed for two", score(noise=..., seeds=1), ValueError, "seeds 1 2"),
    Case("three seeds for two", score(noise=..., seeds=[1, 2, 3]), ValueError, "seeds 3 2"),
    Case("a negative seed", score(noise=..., seeds=[1, -2]), ValueError, "seeds[1] -2"),
    Case("a seed of 33 bits", score(noise=..., seeds=[1, 2**32]), ValueError, "seeds[1] 4294967296"),
    Case("a fractional seed", score(noise=..., seeds=[1, 0.5]), TypeError, "seeds[1] 0.5"),
    Case("a truth value as seed", score(noise=..., seeds=[True, 1]), TypeError, "seeds[0] bool"),
    Case("seeds as text", score(noise=..., seeds="12"), TypeError, "seeds str"),
    Case("seeds on meta", score(noise=..., seeds=torch.zeros(2, device="meta")), TypeError, "seeds"),
    Case("seeds and noise", score(seeds=[1, 2]), ValueError, "noise seeds"),
    Case("seeds and generator", score(noise=..., seeds=[1, 2], generator=generator()), ValueError, "generator seeds"),
    Case("prompts in a table", prompted(np.array([["a", "b"]])), TypeError, "prompts"),
    Case("numbers for prompts", prompted(np.arange(2)), TypeError, "prompts[0] int"),
    Case("bytes for prompts", prompted(np.array([b"a", b"b"])), TypeError, "prompts[0] bytes"),
    Case("a number for prompts", prompted(np.array(3)), TypeError, "prompts int 3"),
]

LATENTS = [
    Case("rank 3", score(latents=latents(16, 8, 8)), ValueError, "latents"),
    Case("rank 5", score(latents=latents(1, 2, 16, 8, 8)), ValueError, "latents"),
    Case("no samples", score(latents=latents(0, 16, 8, 8)), ValueError, "latents"),
    Case("4 channels", score(latents=latents(2, 4, 8, 8)), ValueError, "4 16"),
    Case("odd height", score(latents=latents(2, 16, 7, 8)), ValueError, "latents 7 8 2"),
    Case("odd width", score(latents=latents(2, 16, 8, 9)), ValueError, "latents 8 9 2"),
    Case("no height", score(latents=latents(2, 16, 0, 8)), ValueError, "latents 0 8"),
    Case("too wide", score(latents=latents(2, 16, 8, 50)), ValueError, "latents 48"),
    Case("integers", score(latents=latents(dtype=torch.int64)), ValueError, "latents torch.int64"),
    Case("bytes", score(latents=latents(dtype=torch.uint8)), ValueError, "latents torch.uint8"),
    Case("truth values", score(latents=latents(dtype=torch.bool)), ValueError, "latents torch.bool"),
    Case("complex", score(latents=latents(dtype=torch.complex64)), ValueError, "latents torch.complex64"),
    Case("float8", score(latents=latents(dtype=torch.float8_e4m3fn)), ValueError, "latents float8_e4m3fn"),
    Case("sparse", score(latents=latents().to_sparse()), ValueError, "latents"),
    Case("on meta", score(latents=latents(device="meta")), ValueError, "latents meta"),
    Case("NaN", score(latents=with_value(latents(), NAN)), ValueError, "latents 2048"),
    Case("infinity", score(latents=with_value(latents(), INF)), ValueError, "latents 2048"),
    Case("-infinity", score(latents=with_value(latents(), -INF)), ValueError, "latents 2048"),
    Case("a list", score(latents=[[0.0]]), TypeError, "latents list"),
    Case("an image", score(latents=blank()), TypeError, "latents score_images"),
    Case("nothing", score(latents=None), TypeError, "latents NoneType"),
    Case("an unknown argument", score(timestep=400), TypeError, "timestep", by_signature=True),
    Case("left out", score(latents=...), TypeError, "latents", by_signature=True),
]  # fmt: skip

PROMPTS = [
    Case("one for two", prompted(["a"]), ValueError, "prompts 1 2"),
    Case("a string for two", prompted("a"), ValueError, "prompts 1 2"),
    Case("three for two", prompted(["a", "b", "c"]), ValueError, "prompts 3 2"),
    Case("none", prompted([]), ValueError, "prompts"),
    Case("a number among them", prompted(["a", 3]), TypeError, "prompts int 3"),
    Case("nothing among them", prompted(["a", None]), TypeError, "prompts NoneType"),
    Case("bytes among them", prompted(["a", b"b"]), TypeError, "prompts bytes"),
    Case("bytes", prompted(b"ab"), TypeError, "prompts int"),
    Case("lists among them", prompted([["a"], ["b"]]), TypeError, "prompts list"),
    Case("a set", prompted({"a", "b"}), TypeError, "prompts set"),
    Case("a number", prompted(3), TypeError, "prompts int 3"),
    Case("a million characters", prompted(["a", "b" * 1_000_000]), ValueError, "prompts 1000000"),
    Case("half a surrogate pair", prompted(["a", "\ud800"]), ValueError, "prompts 1 ud800"),
    Case("NUL", prompted(["a", "b\0"]), ValueError, "prompts 1 x00"),
    Case("neither form", prompted(None), ValueError, "prompts"),
    Case("both forms", score(prompts=["a", "b"]), ValueError, "prompts"),
    Case("one form and a half", score(prompts=["a", "b"], prompt_embeds=...), ValueError, "prompts"),
    Case("without pooled", score(pooled_prompt_embeds=...), ValueError, "pooled_prompt_embeds"),
    Case("pooled alone", score(prompt_embeds=...), ValueError, "prompt_embeds"),
]  # fmt: skip

EMBEDDINGS = [
    Case("rank 2", score(prompt_embeds=latents(2, 32)), ValueError, "prompt_embeds 2 32"),
    Case("of three", score(prompt_embeds=latents(3, 5, 32)), ValueError, "2 latents 3 prompt_embeds"),
    Case("narrow", score(prompt_embeds=latents(2, 5, 30)), ValueError, "prompt_embeds 30"),
    Case("without tokens", score(prompt_embeds=latents(2, 0, 32)), ValueError, "prompt_embeds"),
    Case("NaN", score(prompt_embeds=with_value(latents(2, 5, 32), NAN)), ValueError, "prompt_embeds 320"),
    Case("integers", score(prompt_embeds=latents(2, 5, 32).long()), ValueError, "prompt_embeds 2 5 32 torch.int64"),
    Case("on meta", score(prompt_embeds=latents(2, 5, 32, device="meta")), ValueError, "prompt_embeds meta"),
    Case("a list", score(prompt_embeds=[1.0]), ValueError, "prompt_embeds list"),
    Case("pooled of rank 3", score(pooled_prompt_embeds=latents(2, 1, 32)), ValueError, "pooled_prompt_embeds 2 1 32"),
    Case("pooled of one", score(pooled_prompt_embeds=latents(1, 32)), ValueError, "2 latents 1 pooled_prompt_embeds"),
    Case("pooled narrow", score(pooled_prompt_embeds=latents(2, 31)), ValueError, "pooled_prompt_embeds 31"),
    Case("pooled infinite", score(pooled_prompt_embeds=with_value(latents(2, 32), INF)), ValueError, "pooled_prompt_embeds 64"),
    Case("pooled complex", score(pooled_prompt_embeds=latents(2, 32) * 1j), ValueError, "pooled_prompt_embeds torch.complex64"),
]  # fmt: skip

SIGMA = [
    Case("below 0", score(sigma=-0.1), ValueError, "sigma -0.1"),
    Case("a timestep", score(sigma=400), ValueError, "sigma 400"),
    Case("above 1", score(sigma=1.0001), ValueError, "sigma"),
    Case("NaN", score(sigma=NAN), ValueError, "sigma nan"),
    Case("infinity", score(sigma=INF), ValueError, "sigma inf"),
    Case("no levels", score(sigma=()), TypeError, "sigma"),
    Case("one level wrong", score(sigma=(0.2, 1.2)), ValueError, "sigma 1.2"),
    Case("one level NaN", score(sigma=[0.2, NAN]), ValueError, "sigma nan"),
    Case("text", score(sigma="0.4"), TypeError, "sigma 0.4"),
    Case("truth", score(sigma=True), TypeError, "sigma"),
    Case("truth among levels", score(sigma=(0.2, True)), TypeError, "sigma"),
    Case("nested", score(sigma=((0.2, 0.3), 0.4)), TypeError, "sigma"),
    Case("tensors in a list", score(sigma=[torch.tensor([0.2, 0.3])]), TypeError, "sigma"),
    Case("complex", score(sigma=0.4j), TypeError, "sigma"),
    Case("three for two", score(sigma=torch.tensor([0.1, 0.2, 0.3])), ValueError, "sigma (3,)"),
    Case("rank 2", score(sigma=torch.full((2, 2), 0.4)), ValueError, "sigma 2"),
    Case("truth tensor", score(sigma=torch.tensor([True, False])), TypeError, "sigma"),
    Case("complex tensor", score(sigma=torch.tensor([0.4j, 0.4j])), TypeError, "sigma"),
    Case("tensor with NaN", score(sigma=torch.tensor([0.4, NAN])), ValueError, "sigma nan"),
    Case("tensor on meta", score(sigma=torch.zeros(2, device="meta")), ValueError, "sigma meta"),
    Case("number on meta", score(sigma=torch.zeros((), device="meta")), ValueError, "sigma meta"),
    Case("a dictionary", score(sigma={0.4}), TypeError, "sigma"),
]  # fmt: skip

NOISE = [
    Case("of one", score(noise=latents(1, 16, 8, 8)), ValueError, "noise 1 16 8"),
    Case("two draws for one level", score(noise=latents(2, 2, 16, 8, 8)), ValueError, "noise"),
    Case("two draws for three levels", score(noise=latents(2, 2, 16, 8, 8), sigma=(0.2, 0.5, 0.7)), ValueError, "noise 3 2 16 8"),
    Case("integers", score(noise=latents(dtype=torch.int32)), ValueError, "noise torch.int32"),
    Case("truth values", score(noise=latents(dtype=torch.bool)), ValueError, "noise torch.bool"),
    Case("complex", score(noise=latents(dtype=torch.complex64)), ValueError, "noise torch.complex64"),
    Case("NaN", score(noise=with_value(latents(), NAN)), ValueError, "noise 2048"),
    Case("on meta", score(noise=latents(device="meta")), ValueError, "noise meta"),
    Case("a seed", score(noise=7), TypeError, "noise int"),
    Case("and a generator", score(generator=generator()), ValueError, "noise"),
    Case("generator: a seed", score(noise=..., generator=7), TypeError, "generator torch.Generator().manual_seed(seed)"),
    Case("generator: numpy's", score(noise=..., generator=np.random.default_rng(0)), TypeError, "generator Generator"),
    Case("generator: a list", score(noise=..., generator=[generator()]), TypeError, "generator list"),
]  # fmt: skip

IMAGES = [
    Case("a path", score_images("image.png"), TypeError, "images str image.png"),
    Case("paths", score_images(["a.png", "b.png"]), TypeError, "images[0] str a.png"),
    Case("bytes", score_images(b"PNG"), TypeError, "images bytes"),
    Case("arrays, channels first", score_images([np.zeros((3, 64, 64), np.uint8)] * 2), ValueError, "images[0] 3, 64, 64"),
    Case("arrays with alpha", score_images(np.zeros((2, 64, 64, 4), np.uint8)), ValueError, "images 64, 4"),
    Case("a gray array", score_images(np.zeros((64, 64), np.uint8), ["a"]), ValueError, "images 64"),
    Case("16-bit arrays", score_images(np.zeros((2, 64, 64, 3), np.uint16)), ValueError, "images uint16"),
    Case("integer arrays", score_images([np.zeros((64, 64, 3), int)] * 2), ValueError, "images[0] int64"),
    Case("arrays in [-1, 1]", score_images([np.full((64, 64, 3), v) for v in (0.5, -0.5)]), ValueError, "images[1] -0.5"),
    Case("float arrays of bytes", score_images(np.full((2, 64, 64, 3), 255.0)), ValueError, "images 255"),
    Case("arrays of NaN", score_images(np.full((2, 64, 64, 3), NAN)), ValueError, "images nan"),
    Case("arrays of two sizes", score_images([np.zeros((64, 32, 3)), np.zeros((32, 64, 3))]), ValueError, "32, 64 64, 32"),
    Case("tensors of two sizes", score_images([torch.zeros(3, 64, 32), torch.zeros(3, 32, 64)]), ValueError, "32, 64"),
    Case("turned and not", score_images([turned(), blank(size=(32, 64))]), ValueError, "32, 64 64, 32"),
    Case("lists in a list", score_images([[blank()], [blank()]]), TypeError, "images[0] list"),
    Case("an array of objects", score_images(np.full((2, 64, 64, 3), None)), ValueError, "images object"),
    Case("nothing", score_images(None), TypeError, "images NoneType"),
    Case("none", score_images([]), ValueError, "images 0"),
    Case("nothing among them", score_images([blank(), None]), TypeError, "images[1] NoneType"),
    Case("0 x 0 pixels", score_images([blank(size=(0, 0))] * 2), ValueError, "0 pixels"),
    Case("no height", score_images([blank(size=(64, 0))] * 2), ValueError, "64 0 pixels"),
    Case("two sizes", score_images([blank(), blank(size=(32, 64))]), ValueError, "images"),
    Case("a size the VAE has not", score_images([blank(size=(63, 64))] * 2), ValueError, "images"),
    Case("huge", score_images([blank(size=(256, 256))] * 2), ValueError, "images 192"),
    Case("32 bits", score_images([blank("I")] * 2), ValueError, "images[0] I"),
    Case("floats", score_images([blank("F")] * 2), ValueError, "images[0] F"),
    Case("LAB", score_images([blank("LAB")] * 2), ValueError, "images[0] LAB"),
    Case("a line of pixels", score_images([blank(size=(64, 1))] * 2), ValueError, "images[0] 64 1 pixels"),
    Case("integer tensor", score_images(torch.zeros(2, 3, 64, 64, dtype=torch.int64)), ValueError, "images torch.int64"),
    Case("bytes as floats", score_images(torch.full((2, 3, 64, 64), 255.0)), ValueError, "images 255"),
    Case("in [-1, 1]", score_images(torch.full((2, 3, 64, 64), -1.0)), ValueError, "images"),
    Case("NaN", score_images(torch.full((2, 3, 64, 64), NAN)), ValueError, "images"),
    Case("one for two prompts", score_images(torch.zeros(3, 64, 64)), ValueError, "prompts 2 1"),
    Case("rank 2", score_images(torch.zeros(64, 64)), ValueError, "images 64, 64"),
    Case("channels last", score_images(torch.zeros(2, 64, 64, 3)), ValueError, "images 3"),
    Case("gray tensor", score_images(torch.zeros(2, 1, 64, 64)), ValueError, "images 3"),
    Case("empty tensor", score_images(torch.zeros(0, 3, 64, 64)), ValueError, "images"),
    Case("on meta", score_images(torch.zeros(2, 3, 64, 64, device="meta")), ValueError, "images meta"),
    Case("one prompt for two", score_images([blank()] * 2, ["a"]), ValueError, "prompts 1 2"),
    Case("wrong sigma", score_images([blank()] * 2, sigma=2.0), ValueError, "sigma 2"),
]  # fmt: skip

SERVED = [
    *(
        Case(f"an answer: {text}", lambda _, text=text: TEMPLATES["point"].read(text), ValueError, "Final Score 1 5")
        for text in (
            "",
            "I cannot tell.",
            "**Final Score**: **0**",
            "Final Score: 5,5",
            "Final Score: 4 out of 10",
            "Final Score: 4/10",
            "Final Score: 80%",
            "Final Score: nan",
            "Final Score: 3\nFinal Score: 4",
        )
    ),
    Case(
        "an axis is missing", lambda _: TEMPLATES["acs"].read("Alignment Score (1-5): 4"), ValueError, "Coherence Score"
    ),
    Case(
        "a version that compares",
        lambda _: UnifiedReward.from_pretrained(model="UnifiedReward-Think-7b"),
        ValueError,
        "model UnifiedReward-Think-7b",
    ),
    Case("two models", lambda _: UnifiedReward.from_pretrained("http://h/v1#b", model="a"), ValueError, "model a b"),
    Case("an unknown question", lambda _: UnifiedReward.from_pretrained(template="pair"), ValueError, "template pair"),
    Case("no attempts", lambda _: UnifiedReward.from_pretrained(attempts=0), ValueError, "attempts 0"),
    Case(
        "no server",
        lambda _: ChatEndpoint("http://127.0.0.1:9/v1", attempts=2, pause=0).ask(Image.new("RGB", (8, 8)), "?", float),
        ConnectionError,
        "127.0.0.1 2",
    ),
]

PIXEL_REWARD = [
    Case("no prompts", clip(prompts=...), TypeError, "prompts", by_signature=True),
    Case("embeddings for prompts", clip(prompts=..., **TEXT), TypeError, "prompts", by_signature=True),
    Case("a string for two", clip(prompts="ab"), ValueError, "2"),
    Case("one prompt for two", clip(prompts=["a"]), ValueError, "1 2"),
    Case("a number as prompt", clip(prompts=["a", 1]), TypeError, "prompts int 1"),
    Case("4 channels", clip(latents=latents(2, 4, 8, 8)), ValueError, "latents 16"),
    Case("rank 2", clip(latents=latents(8, 8)), ValueError, "latents"),
    Case("integers", clip(latents=latents(dtype=torch.int64)), TypeError, "latents torch.int64"),
    Case("no samples", clip(latents=latents(0, 16, 8, 8)), ValueError, "latents"),
    Case("NaN", clip(latents=with_value(latents(), NAN)), ValueError, "latents 2048"),
    Case("a list", clip(latents=[1.0]), TypeError, "latents[0] float"),
    Case("a path as image", lambda w: w.clip.score_images(["a.png"], ["a"]), TypeError, "images[0] str"),
    Case("one image for two prompts", lambda w: w.clip.score_images(blank(), ["a", "b"]), ValueError, "2 prompts"),
    Case("no images", lambda w: w.clip.score_images([], []), ValueError, "images 0"),
    Case("bytes as floats", lambda w: w.clip.score_images(torch.full((1, 3, 64, 64), 255.0), ["a"]), ValueError, "images 255"),
    Case("an empty image", lambda w: w.clip.score_images([blank(size=(0, 4))], ["a"]), ValueError, "0 4 pixels"),
    Case("two prompts for one image", lambda w: w.clip.score_images([blank()], ["a", "b"]), ValueError, "2 prompts"),
]  # fmt: skip


def loaded(source=None, **options):
    return lambda w: LatentReward.from_pretrained(
        w.reward_dir if source is None else source, **{n: v(w) if callable(v) else v for n, v in options.items()}
    )


LOADING = [
    Case("unknown dtype", loaded(dtype="int8"), ValueError, "dtype int8"),
    Case("integer dtype", loaded(dtype=torch.int32), ValueError, "dtype torch.int32"),
    Case("unknown device", loaded(device="gpu"), ValueError, "device gpu"),
    Case("device meta", loaded(device="meta"), ValueError, "device: got meta"),
    Case("device that is not there", loaded(device="cuda:99"), ValueError, "device: got cuda"),
    Case("the VAE as transformer", loaded(transformer=lambda w: w.pipeline.vae), TypeError, "transformer AutoencoderKL"),
    Case("text of no tokens", loaded(text_length=0), ValueError, "text_length 0"),
    Case("text beyond T5's", loaded(text_length=600), ValueError, "text_length 600"),
    Case("text length in words", loaded(text_length="128"), TypeError, "text_length str"),
    Case("text length half", loaded(text_length=12.5), TypeError, "text_length float"),
    Case("another class as pipeline", loaded(pipeline=lambda w: w.pipeline.vae), TypeError, "pipeline AutoencoderKL"),
    Case("no folder as pipeline", loaded(pipeline="pipeline"), ValueError, "pipeline"),
    Case("sigma above 1", loaded(sigma=1.5), ValueError, "sigma 1.5"),
    Case("sigma text", loaded(sigma="0.4"), TypeError, "sigma str"),
    Case("no sigma levels", loaded(sigma=()), ValueError, "sigma ()"),
    Case("unknown option", loaded(revison="main"), TypeError, "revison"),
    Case("onload to gpu", lambda w: w.reward.onload("gpu"), ValueError, "device gpu"),
    Case("pickled with a pipeline in memory", lambda w: pickle.dumps(w.reward), TypeError, "pipeline save_pretrained"),
    Case("nothing as source", loaded(3), TypeError, "reward int"),
    Case("format unknown", lambda w: w.reward.save_pretrained(w.fresh(), format="peft"), ValueError, "format peft"),
    Case("saved to nothing", lambda w: w.reward.save_pretrained(""), TypeError, "directory"),
    Case("saved to a number", lambda w: w.reward.save_pretrained(3), TypeError, "directory 3"),
    Case("saved to a file", lambda w: w.reward.save_pretrained(w.file("f", "x")), OSError, "f"),
    Case("saved below a file", lambda w: w.reward.save_pretrained(w.file("f", "x") / "r"), OSError, "f"),
]  # fmt: skip

X, V = latents(), latents()
ONE = torch.ones(2)

NOISE_FUNCTIONS = [
    Case("noise of another shape", of(add_noise, X, V[:1], 0.4), ValueError, "noise 1 16 8"),
    Case("noise that is none", of(add_noise, X, 0.5, 0.4), TypeError, "noise float"),
    Case("integer latents", of(add_noise, X.long(), V, 0.4), TypeError, "latents torch.int64"),
    Case("latents of rank 3", of(add_noise, X[0], V[0], 0.4), ValueError, "latents"),
    Case("sigma above 1", of(add_noise, X, V, 400.0), ValueError, "sigma 400"),
    Case("sigma NaN", of(add_noise, X, V, torch.tensor([NAN, 0.4])), ValueError, "sigma"),
    Case("sigma of three", of(add_noise, X, V, torch.zeros(3)), ValueError, "sigma 3 2"),
    Case("sigma text", of(add_noise, X, V, "0.4"), TypeError, "sigma str"),
    Case("sigma truth", of(add_noise, X, V, True), TypeError, "sigma bool"),
    Case("sigma on meta", of(timestep_of, torch.zeros(2, device="meta")), TypeError, "sigma"),
    Case("sigma empty", of(timestep_of, torch.zeros(0)), TypeError, "sigma"),
    Case("timestep for sigma", of(timestep_of, torch.tensor([400.0])), ValueError, "sigma"),
    Case("velocity of another shape", of(denoised, X, V[:, :4], 0.4), ValueError, "velocity"),
    Case("shift 0", of(shift_sigma, ONE, 0.0), ValueError, "shift 0"),
    Case("no timesteps", of(scheduler_sigmas, 0), ValueError, "num_train_timesteps 0"),
    Case("no table", of(snap_sigma, 0.4, torch.zeros(0)), ValueError, "table (0,)"),
    Case("negative seed", of(seeded_generator, -1), ValueError, "-1"),
    Case("fractional seed", of(seeded_generator, 0.5), TypeError, "0.5"),
    Case("unknown density", of(sample_sigma, "gauss", 4, generator=generator()), ValueError, "gauss"),
    Case("density of nothing", of(sample_sigma, None, 4, generator=generator()), ValueError, "density None"),
    Case("no draws", of(sample_sigma, "uniform", 0, generator=generator()), ValueError, "n 0"),
    Case("density without generator", of(sample_sigma, "uniform", 4, generator=None), TypeError, "generator"),
    Case("beta of 0", of(sample_sigma, "beta", 4, generator=generator(), a=0.0), ValueError, "a 0"),
    Case("mean NaN", of(sample_sigma, "logit_normal", 4, generator=generator(), mean=NAN), ValueError, "mean nan"),
    Case("constant 2", of(sample_sigma, "constant", 4, generator=generator(), value=2.0), ValueError, "constant"),
]  # fmt: skip


def loss(chosen=ONE, rejected=ONE, sigma=0.5 * ONE, label=1.0):
    return of(preference_loss, chosen, rejected, sigma, label, config=LossConfig())


LOSSES = [
    Case("scores of two lengths", loss(rejected=torch.ones(3)), ValueError, "score_chosen score_rejected sigma"),
    Case("sigma of another length", loss(sigma=torch.ones(3)), ValueError, "score_chosen score_rejected sigma"),
    Case("scores of rank 2", loss(*[torch.ones(2, 1)] * 3), ValueError, "score_chosen score_rejected sigma"),
    Case("no pairs", loss(*[torch.ones(0)] * 3), ValueError, "score_chosen score_rejected sigma"),
    Case("integer scores", loss(chosen=ONE.long()), TypeError, "score_chosen torch.int64"),
    Case("a list of scores", loss(chosen=[1.0, 1.0]), TypeError, "score_chosen list"),
    Case("sigma a number", loss(sigma=0.4), TypeError, "sigma float"),
    Case("sigma above 1", loss(sigma=400 * ONE), ValueError, "sigma"),
    Case("sigma NaN", loss(sigma=NAN * ONE), ValueError, "sigma"),
    Case("label above 1", loss(label=1.5), ValueError, "1.5"),
    Case("label NaN", loss(label=NAN * ONE), ValueError, "nan"),
    Case("labels of three", loss(label=torch.ones(3)), ValueError, "label"),
    Case("label text", loss(label="chosen"), TypeError, "label str"),
    Case("config a dictionary", of(preference_loss, ONE, ONE, ONE, config={}), TypeError, "LossConfig"),
]  # fmt: skip

SAMPLING = [
    Case("no steps", of(schedule_sigmas, lambda w: w.pipeline.scheduler, 0), ValueError, "num_steps 0"),
    Case("half a step", of(schedule_sigmas, lambda w: w.pipeline.scheduler, 2.5), TypeError, "num_steps"),
    Case("velocity of another shape", of(ode_step, X, V[:1], 1.0, 0.5), ValueError, "velocity"),
    Case("sigma above 1", of(ode_step, X, V, 1.5, 0.5), ValueError, "sigma 1.5"),
    Case("sigma NaN", of(ode_step, X, V, 1.0, NAN), ValueError, "sigma_next nan"),
    Case("no levels", of(rollout, lambda w: lambda x, s: x, X, []), ValueError, "sigmas"),
    Case("rising levels", of(rollout, lambda w: lambda x, s: x, X, [0.0, 1.0]), ValueError, "sigmas"),
    Case("levels with NaN", of(rollout, lambda w: lambda x, s: x, X, [1.0, NAN]), ValueError, "sigmas"),
    Case("no generators", of(seeded_noise, (16, 8, 8), []), TypeError, "generators"),
    Case("seeds for generators", of(seeded_noise, (16, 8, 8), [1, 2]), TypeError, "generators"),
]  # fmt: skip


def velocity(**changes):
    def call(world: World) -> object:
        conditions = Conditions(["a", "b"], **TEXT)
        arguments = {"latents": latents(), "sigma": 0.5, "conditions": conditions, **changes}
        return world.policy.velocity(**arguments)

    return call


def policy(transformer=None, lora=None, seed=0):
    def call(world: World) -> object:
        return Policy(
            transformer(world) if transformer else world.policy.transformer, lora or LoraConfig(2, 2), seed=seed
        )

    return call


POLICY = [
    Case("the VAE", policy(lambda w: w.pipeline.vae), TypeError, "policy AutoencoderKL"),
    Case("a dictionary as config", policy(lora={"rank": 2}), TypeError, "policy dict"),
    Case("negative seed", policy(seed=-1), ValueError, "seed -1"),
    Case("a second one", policy(), ValueError, "policy"),
    Case("rank 3", velocity(latents=latents(16, 8, 8)), ValueError, "latents"),
    Case("4 channels", velocity(latents=latents(2, 4, 8, 8)), ValueError, "4 16"),
    Case("integers", velocity(latents=latents(dtype=torch.int64)), TypeError, "latents torch.int64"),
    Case("three latents", velocity(latents=latents(3, 16, 8, 8)), ValueError, "3 latents 2 conditions"),
    Case("sigma above 1", velocity(sigma=500.0), ValueError, "sigma 500"),
    Case("guidance without negatives", velocity(guidance_scale=4.5), ValueError, "guidance_scale 4.5"),
    Case("guidance NaN", velocity(guidance_scale=NAN), ValueError, "guidance_scale nan"),
    Case("guidance below 0", velocity(guidance_scale=-1.0), ValueError, "guidance_scale -1"),
    Case("conditions of two lengths", of(Conditions, ["a"], **TEXT), ValueError, "prompt"),
    Case("conditions of one string", of(Conditions, "ab", **TEXT), ValueError, "prompt"),
    Case("embeddings of rank 2", of(Conditions, ["a", "b"], TEXT["pooled_prompt_embeds"], TEXT["pooled_prompt_embeds"]), TypeError, "prompt_embeds"),
    Case("saved to a file", lambda w: w.policy.save_lora(w.file("f", "x")), OSError, "f"),
]  # fmt: skip

ENCODING = [
    Case("prompts of no one", lambda w: w.reward.encoder([]), ValueError, "prompts"),
    Case("a bare prompt", lambda w: w.reward.encoder("a circle"), TypeError, "prompts str"),
    Case("4 channels decoded", of(decode_latents, lambda w: w.pipeline.vae, latents(2, 4, 8, 8)), ValueError, "16"),
    Case("a batch of no pairs", of(PairBatch, X, CONDITIONS, chosen=torch.zeros(0).long(), rejected=torch.zeros(0).long(), label=torch.zeros(0), group=torch.zeros(2).long()), ValueError, "pairs"),
    Case("a batch with NaN", of(PairBatch, with_value(X, NAN), CONDITIONS, chosen=torch.tensor([0]), rejected=torch.tensor([1]), label=torch.ones(1), group=torch.zeros(2).long()), ValueError, "latents"),
    Case("rows as floats", of(PairBatch, X, CONDITIONS, chosen=torch.tensor([0.0]), rejected=torch.tensor([1]), label=torch.ones(1), group=torch.zeros(2).long()), TypeError, "chosen torch.float32"),
    Case("rows out of range", of(PairBatch, X, CONDITIONS, chosen=torch.tensor([0]), rejected=torch.tensor([2]), label=torch.ones(1), group=torch.zeros(2).long()), ValueError, "0 2"),
]  # fmt: skip

BUILDING = [
    Case("config a dictionary", of(build_reward_model, {}, lambda w: w.pipeline.transformer), TypeError, "RewardConfig"),
    Case("more layers than blocks", of(build_reward_model, of(RewardConfig, num_layers=9, visual_taps=(1,), text_taps=(1,)), lambda w: w.pipeline.transformer), ValueError, "num_layers 9"),
    Case("heads that do not divide", of(RewardHead, of(HeadConfig, num_attn_heads=5), 16, 1, 1), ValueError, "5 16"),
]  # fmt: skip

SETTINGS = [
    Case("num_layers text", of(RewardConfig, num_layers="12"), TypeError, "num_layers str 12"),
    Case("num_layers truth", of(RewardConfig, num_layers=True), TypeError, "num_layers bool"),
    Case("num_layers fraction", of(RewardConfig, num_layers=12.0), TypeError, "num_layers float"),
    Case("num_layers negative", of(RewardConfig, num_layers=-1), ValueError, "num_layers -1"),
    Case("no visual taps", of(RewardConfig, visual_taps=()), ValueError, "visual_taps"),
    Case("falling taps", of(RewardConfig, visual_taps=(8, 4)), ValueError, "visual_taps 8 4"),
    Case("tap beyond the layers", of(RewardConfig, text_taps=(4, 13)), ValueError, "text_taps 13"),
    Case("tap of text", of(RewardConfig, text_taps=("4",)), TypeError, "text_taps[0] str"),
    Case("taps a number", of(RewardConfig, text_taps=4), TypeError, "text_taps int"),
    Case("sigma above 1", of(RewardConfig, sigma=1.4), ValueError, "sigma 1.4"),
    Case("sigma NaN", of(RewardConfig, sigma=NAN), ValueError, "sigma nan"),
    Case("sigma no levels", of(RewardConfig, sigma=()), ValueError, "sigma"),
    Case("image sigma text", of(RewardConfig, image_sigma="0.1"), TypeError, "image_sigma str"),
    Case("scale 0", of(RewardConfig, score_scale=0.0), ValueError, "score_scale 0"),
    Case("scale infinite", of(RewardConfig, score_scale=INF), ValueError, "score_scale inf"),
    Case("bias beyond floats", of(RewardConfig, score_bias=10**400), ValueError, "score_bias"),
    Case("text length 0", of(RewardConfig, text_length=0), ValueError, "text_length 0"),
    Case("text length endless", of(RewardConfig, text_length=10**9), ValueError, "text_length 1000000000"),
    Case("tuning unknown", of(RewardConfig, tuning="lara"), ValueError, "tuning lara"),
    Case("tuning nothing", of(RewardConfig, tuning=None), ValueError, "tuning"),
    Case("lora a dictionary", of(RewardConfig, lora={"rank": 4}), TypeError, "lora dict"),
    Case("snap a number", of(RewardConfig, snap_sigma=1), TypeError, "snap_sigma int 1"),
    Case("base model of nothing", of(RewardConfig, base_model_id=""), ValueError, "base_model_id"),
    Case("base model with NUL", of(RewardConfig, base_model_id="a\0b"), ValueError, "base_model_id NUL"),
    Case("version of the future", of(RewardConfig, format_version=99), ValueError, "format_version 99"),
    Case("unknown setting", of(RewardConfig, sigmas=(0.1,)), TypeError, "sigmas", by_signature=True),
    Case("rank 0", of(LoraConfig, rank=0), ValueError, "rank 0"),
    Case("rank truth", of(LoraConfig, rank=True), TypeError, "lora rank bool"),
    Case("alpha NaN", of(LoraConfig, alpha=NAN), ValueError, "lora alpha nan"),
    Case("init unknown", of(LoraConfig, init="zeros"), ValueError, "lora init zeros"),
    Case("no queries", of(HeadConfig, num_queries=0), ValueError, "num_queries 0"),
    Case("dropout 1", of(HeadConfig, dropout=1.0), ValueError, "dropout 1"),
    Case("dropout text", of(HeadConfig, dropout="0.1"), TypeError, "head dropout str"),
    Case("width that heads do not divide", of(HeadConfig, width=12), ValueError, "width 12"),
    Case("likelihood unknown", of(LossConfig, likelihood="thurston"), ValueError, "likelihood thurston"),
    Case("objective unknown", of(LossConfig, objective="hinge"), ValueError, "loss objective hinge"),
    Case("variance 0", of(LossConfig, variance=0.0), ValueError, "variance 0"),
    Case("k NaN", of(LossConfig, k=NAN), ValueError, "loss k nan"),
    Case("margin text", of(LossConfig, margin="1"), TypeError, "loss margin str"),
    Case("density unknown", of(SigmaConfig, density="normal"), ValueError, "density normal"),
    Case("std below 0", of(SigmaConfig, std=-1.0), ValueError, "std -1"),
    Case("constant beyond 1", of(SigmaConfig, value=2.0), ValueError, "value 2"),
    Case("lr negative", of(OptimConfig, lr=-1e-3), ValueError, "optim lr -0.001"),
    Case("lr NaN", of(OptimConfig, lr=NAN), ValueError, "optim lr nan"),
    Case("lr text", of(OptimConfig, lr="1e-4"), TypeError, "optim lr str 1e-4"),
    Case("beta 1", of(OptimConfig, beta1=1.0), ValueError, "beta1 1"),
    Case("eps 0", of(OptimConfig, eps=0.0), ValueError, "eps 0"),
    Case("decay share 0", of(OptimConfig, decay_share=0.0), ValueError, "decay_share"),
    Case("schedule unknown", of(OptimConfig, schedule="cosin"), ValueError, "schedule cosin"),
    Case("warm-up of half a step", of(OptimConfig, warmup_steps=0.5), TypeError, "optim warmup_steps"),
    Case("warm-up of -1 steps", of(OptimConfig, warmup_steps=-1), ValueError, "warmup_steps -1"),
    Case("clip negative", of(OptimConfig, clip=-1.0), ValueError, "clip -1"),
    Case("weight decay negative", of(OptimConfig, weight_decay=-0.1), ValueError, "weight_decay -0.1"),
    Case("beta2 1", of(OptimConfig, beta2=1.0), ValueError, "beta2 1"),
    Case("no micro-batch", of(LoopConfig, accumulate=0), ValueError, "accumulate 0"),
    Case("average every 0 updates", of(LoopConfig, ema_every=0), ValueError, "ema_every 0"),
    Case("checkpoints every -1 updates", of(LoopConfig, checkpoint_every=-1), ValueError, "checkpoint_every -1"),
    Case("timeout infinite", of(LoopConfig, timeout=INF), ValueError, "timeout inf"),
    Case("no steps", of(LoopConfig, steps=0), ValueError, "steps 0"),
    Case("steps truth", of(LoopConfig, steps=True), TypeError, "loop steps bool"),
    Case("ema 1", of(LoopConfig, ema_decay=1.0), ValueError, "ema_decay 1"),
    Case("ema NaN", of(LoopConfig, ema_decay=NAN), ValueError, "loop ema_decay nan"),
    Case("keep nothing", of(LoopConfig, keep_last=0), ValueError, "keep_last 0"),
    Case("more gradient steps than steps", of(ReflConfig, num_steps=2, grad_steps=3), ValueError, "grad_steps 3"),
    Case("earliest 2", of(ReflConfig, earliest=2.0), ValueError, "earliest 2"),
    Case("KL NaN", of(ReflConfig, kl_weight=NAN), ValueError, "refl kl_weight nan"),
    Case("guidance below 0", of(ReflConfig, guidance_scale=-2.0), ValueError, "guidance_scale -2"),
    Case("no reward levels", of(ReflConfig, reward_sigma=[]), ValueError, "refl reward_sigma"),
    Case("reward level 400", of(ReflConfig, reward_sigma=[400.0]), ValueError, "reward_sigma 400"),
    Case("range of three", of(ReflConfig, reward_sigma_range=(0.1, 0.2, 0.3)), ValueError, "reward_sigma_range"),
    Case("range reversed", of(ReflConfig, reward_sigma_range=(0.7, 0.2)), ValueError, "reward_sigma_range 0.7 0.2"),
    Case("range with NaN", of(ReflConfig, reward_sigma_range=(0.1, NAN)), ValueError, "refl reward_sigma_range[1]"),
    Case("one sample", of(EvaluationConfig, samples=1), ValueError, "samples 1"),
    Case("nothing shown", of(EvaluationConfig, shown=0), ValueError, "evaluation shown 0"),
    Case("evaluation guidance below 0", of(EvaluationConfig, guidance_scale=-1.0), ValueError, "evaluation guidance_scale -1"),
    Case("evaluation guidance NaN", of(EvaluationConfig, guidance_scale=NAN), ValueError, "evaluation guidance_scale nan"),
    Case("evaluation guidance infinite", of(EvaluationConfig, guidance_scale=INF), ValueError, "evaluation guidance_scale inf"),
    Case("evaluation in no steps", of(EvaluationConfig, num_steps=0), ValueError, "evaluation num_steps 0"),
    Case("evaluation in half a step", of(EvaluationConfig, num_steps=0.5), TypeError, "evaluation num_steps"),
    Case("KL unit unknown", of(ReflConfig, kl_unit="std"), ValueError, "refl kl_unit std"),
    Case("spread of equal scores", lambda w: spread(torch.full((16, 4), 0.5)), ValueError, "0.5 differ"),
    Case("spread of rounding", lambda w: spread(torch.tensor([[1e6, 1e6 + 0.0625]])), ValueError, "1e+06 differ"),
    Case("spread with NaN", lambda w: spread(torch.tensor([[NAN, 1.0]])), ValueError, "nan differ"),
    Case("evaluation seed -1", of(EvaluationConfig, seed=-1), ValueError, "evaluation seed -1"),
    Case("height 40", of(ReflRun, height=40), ValueError, "height 40"),
    Case("policy a dictionary", of(ReflRun, policy={"rank": 4}), TypeError, "policy dict"),
    Case("no accuracy levels", of(AccuracyConfig, sigmas=[]), ValueError, "sigmas"),
    Case("accuracy level NaN", of(AccuracyConfig, sigmas=[NAN]), ValueError, "accuracy sigmas[0] nan"),
    Case("full tuning in the recipe", of(TrainRewardRun, reward=of(RewardConfig, tuning="full")), ValueError, "reward tuning"),
    Case("seed -1", of(TrainRewardRun, seed=-1), ValueError, "seed -1"),
    Case("batch of nothing", of(TrainRewardRun, batch_size=0), ValueError, "batch_size 0"),
    Case("image of 63 pixels", of(StackConfig, image_size=63), ValueError, "image_size 63"),
    Case("widths the norms do not divide", of(StackConfig, vae_channels=(12,)), ValueError, "vae_channels"),
    Case("dual block beyond the depth", of(StackConfig, dual_attention_layers=(9,)), ValueError, "dual_attention_layers"),
    Case("tolerance beyond the clip", of(GrpoConfig, clip_range=3e-6, ratio_tolerance=1e-5), ValueError, "ratio_tolerance 3e-06"),
    Case("tolerance NaN", of(GrpoConfig, ratio_tolerance=NAN), ValueError, "ratio_tolerance nan"),
    Case("a model's text too long", of(MODELS["sd35"].with_text_length, 513), ValueError, "text_length 513"),
    Case("a model's text of words", of(MODELS["sd35"].with_text_length, "128"), TypeError, "text_length str"),
    Case("depth text", of(StackConfig, depth="6"), TypeError, "stack depth str"),
    Case("emphasis on nothing known", of(PairsConfig, emphasis={"color": 2.0}), ValueError, "color"),
    Case("emphasis 0", of(PairsConfig, emphasis={"shape": 0.0}), ValueError, "emphasis shape"),
    Case("one image per caption", of(PairsConfig, images=1), ValueError, "images 1"),
    Case("tie gap below 0", of(PairsConfig, tie_gap=-0.1), ValueError, "tie_gap -0.1"),
    Case("build on a TPU", of(BuildConfig, device="tpu"), ValueError, "device tpu"),
    Case("not a dictionary", lambda w: RewardConfig.from_dict([1]), TypeError, "list"),
    Case("an empty dictionary", lambda w: RewardConfig.from_dict({}), ValueError, "base_model_id"),
]  # fmt: skip


LRM = [
    Case("SD3's latents", lrm(latents=latents()), ValueError, "latents 16 lrm-sd15 4 0.18215"),
    Case("SD3's latents, clean", lambda w: w.lrm(latents(), ["a", "b"]), ValueError, "latents 16 lrm-sd15 4 0.18215"),
    Case("latents NaN", lrm(latents=with_value(latents(2, 4, 8, 8), NAN)), ValueError, "latents 512"),
    Case("latents of bytes", lrm(latents=latents(2, 4, 8, 8, dtype=torch.uint8)), TypeError, "latents torch.uint8"),
    Case("no latents", lrm(latents=latents(0, 4, 8, 8)), ValueError, "latents"),
    Case("latents on meta", lrm(latents=latents(2, 4, 8, 8, device="meta")), ValueError, "latents meta"),
    Case("a timestep after the last", lrm(timestep=1000), ValueError, "timestep 1000 999"),
    Case("a timestep before the first", lrm(timestep=-1), ValueError, "timestep -1"),
    Case("sigma for a timestep", lrm(timestep=0.4), TypeError, "timestep float 0.4"),
    Case("a tensor of sigma", lrm(timestep=torch.tensor([0.4, 0.4])), ValueError, "timestep torch.float32"),
    Case("truth for a timestep", lrm(timestep=True), TypeError, "timestep bool"),
    Case("timesteps for three", lrm(timestep=torch.tensor([1, 2, 3])), ValueError, "timestep 3 2"),
    Case("one timestep too large", lrm(timestep=torch.tensor([1, 1001])), ValueError, "timestep 1001"),
    Case("timesteps on meta", lrm(timestep=torch.ones(2, device="meta").long()), ValueError, "timestep meta"),
    Case("one prompt for two", lrm(prompts=["a"]), ValueError, "prompts 1 2"),
    Case("embeddings without text", lrm(prompts=CONDITIONS), ValueError, "prompts"),
    Case("a flow-matching sigma", lambda w: w.lrm.score_noisy(latents(2, 4, 8, 8), 0.4, ["a", "b"]), TypeError, "lrm-sd15 sigma DDPM score_timestep"),
    Case("images of one channel", lambda w: w.lrm.score_images(torch.zeros(1, 1, 64, 64), "a"), ValueError, "images 1 64"),
]  # fmt: skip


GROUPS = {
    "reward: as a service": SERVICE,
    "reward: latents": LATENTS,
    "reward: prompts": PROMPTS,
    "reward: embeddings": EMBEDDINGS,
    "reward: sigma": SIGMA,
    "reward: noise and generator": NOISE,
    "reward: images": IMAGES,
    "reward: loading and saving": LOADING,
    "pixel reward": PIXEL_REWARD,
    "served reward": SERVED,
    "LRM": LRM,
    "noise": NOISE_FUNCTIONS,
    "losses": LOSSES,
    "sampling": SAMPLING,
    "policy": POLICY,
    "encoding and batches": ENCODING,
    "building models": BUILDING,
    "settings": SETTINGS,
}
