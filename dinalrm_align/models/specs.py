"""Models that `--model` can name, each an SD3 pipeline with rewards for its latents and images. Torch-free."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from dinalrm_align.models.layout import check_files, missing_files, missing_weights
from dinalrm_align.train.files import HUB_ID, read_json
from dinalrm_align.train.settings import Source, check_integer, did_you_mean

PACKAGE = Path(__file__).parents[1]
SHAPES_WEIGHTS = PACKAGE / "shapes" / "weights"
HUB_SECONDS = 3.0
"""Timeout of the requests for access to the hub, in seconds, for all repositories together."""
SHAPES_VOCABULARY = 1000
"""More tokens than the CLIP tokenizer of the embedded world has (643), and fewer than CLIP's (49,408)."""
_LORA = "checkpoint/backbone_lora/adapter"
RELEASED_REWARD_FILES = ("config.json", "checkpoint/rm_head.pt", f"{_LORA}_config.json", f"{_LORA}_model.safetensors")
"""Files of the released DiNa-LRM in its hub repository."""

Gold = str | Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A pipeline with its rewards, prompts and default sampling settings.

    Args:
        kind: built-in model whose recipe settings apply, "sd35" or "shapes".
        pipeline: hub id or folder of a StableDiffusion3Pipeline.
        reward: hub id or folder of the DiNa-LRM, a reward on latents.
        pixel: hub id or folder of the `ClipReward`, a reward on images.
        pixel_processor: hub id or folder of the tokenizer and preprocessor of `pixel`; None means `pixel` itself.
        weights: folder whose subfolders replace hub repositories (`find`); None: there is none.
        gold: reward that scores the policy's images in evaluation. A callable takes images (B, 3, H, W) in [0, 1]
            and prompts. A string is the name of a reward, such as "pixel", or of a callable ("module:function").
        train_prompts, heldout_prompts: text files with one prompt per line, for training and for evaluation.
        height, width: size of the sampled images in pixels.
        reward_size: height and width in pixels of the images that `reward` was trained on; image files are resized to
            this area for a latent reward.
        text_length: T5 tokens per prompt (`max_sequence_length` of the pipeline).
    """

    name: str
    kind: Literal["sd35", "shapes"]
    pipeline: str
    reward: str
    pixel: str
    pixel_processor: str | None
    gold: Gold
    train_prompts: Path
    heldout_prompts: Path
    height: int
    width: int
    reward_size: int
    num_steps: int
    guidance_scale: float
    text_length: int
    dtype: Literal["float32", "bfloat16", "float16"]
    weights: str | None = None

    def find(self, repository: str | None, *names: str) -> str | None:
        """Return the subfolder of `weights` that is called one of `names` or like the repository; else `repository`."""
        known = [*names, *([repository.rpartition("/")[2]] if repository else [])]
        folders = [Path(self.weights) / name for name in known] if self.weights else []
        return next((str(folder) for folder in folders if folder.is_dir() or folder.is_symlink()), repository)

    def with_text_length(self, text_length: int | None) -> "ModelSpec":
        """Return the model with `text_length` T5 tokens per prompt, 1 to 512; None: the model unchanged."""
        if text_length is None:
            return self
        check_integer("text_length", text_length, low=1, high=512)
        return dataclasses.replace(self, text_length=text_length)


# [diffusion-rm] github.com/HKUST-C4G/diffusion-rm, the reward; [alignment] its flow-grpo-rm/config/refl.py and grpo.py
MODELS: dict[str, ModelSpec] = {
    "sd35": ModelSpec(
        name="sd35",
        kind="sd35",
        pipeline="stabilityai/stable-diffusion-3.5-medium",  # [alignment] pretrained.model
        reward="liuhuohuo/DiNa-LRM-SD35M-12layers",  # [diffusion-rm] README
        pixel="yuvalkirstain/PickScore_v1",  # [alignment] flow_grpo/pickscore_scorer.py
        pixel_processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",  # [alignment] flow_grpo/pickscore_scorer.py
        gold="pixel",  # PickScore, the gold reward of the paper's alignment runs, [alignment] proxy_reward_fn
        train_prompts=PACKAGE / "data" / "prompt_lists" / "train.txt",  # 96 prompts of this project
        heldout_prompts=PACKAGE / "data" / "prompt_lists" / "heldout.txt",  # 32 prompts of this project
        height=512,  # [alignment] resolution
        width=512,  # [alignment] resolution
        reward_size=1024,  # [diffusion-rm] config/sd3m/thurstone-12layer.yaml, reference_size
        num_steps=40,  # [alignment] eval_num_steps
        guidance_scale=4.5,  # [alignment] eval_guidance_scale
        text_length=128,  # [diffusion-rm] diffusion_rm/models/sd3_rm.py, the training code's max_sequence_length
        dtype="bfloat16",  # [alignment] mixed_precision of ReFL; bfloat16 in the reward's README
    ),
    "shapes": ModelSpec(
        name="shapes",
        kind="shapes",
        pipeline=str(SHAPES_WEIGHTS / "pipeline"),
        reward=str(SHAPES_WEIGHTS / "dinalrm"),
        pixel=str(SHAPES_WEIGHTS / "pixel"),
        pixel_processor=None,
        gold="dinalrm_align.shapes.oracle:oracle_score",
        train_prompts=PACKAGE / "shapes" / "prompts" / "train.txt",
        heldout_prompts=PACKAGE / "shapes" / "prompts" / "heldout.txt",
        height=64,
        width=64,
        reward_size=64,
        num_steps=12,
        guidance_scale=3.0,
        text_length=16,
        dtype="float32",
    ),
}


class ModelName(Source):
    """Type of the setting `model`: auto, a name in `MODELS`, or the folder or hub id of a pipeline."""

    words = ("auto", *MODELS)


HOW_TO_GET_SD35 = (
    f"to run Stable Diffusion 3.5 Medium: accept its licence at https://huggingface.co/{MODELS['sd35'].pipeline}, run "
    "`hf auth login`, and start again with --model sd35; or pass the folder of a downloaded copy, --model PATH"
)
HOW_TO_GET_SHAPES = "to run the small embedded world instead: --model shapes"


def resolve_model(name: str) -> tuple[ModelSpec, str]:
    """Return the model for `--model name`, and a message that says which model this is.

    The name "auto" selects `sd35` (Stable Diffusion 3.5 Medium) if its weights are complete in the local cache or the
    hub grants access to them within 3 seconds, otherwise `shapes`, the small model that ships with the package. With
    HF_HUB_OFFLINE the hub is not asked. Other valid names are "sd35", "shapes", a hub id, a pipeline folder,
    and a folder with a pipeline folder in it. Rewards are looked for beside the pipeline folder (`_from_folder`). These
    names have no fallback.
    """
    if name == "auto":
        return _choose()
    if name in MODELS:
        how = HOW_TO_GET_SHAPES if name == "sd35" else HOW_TO_GET_SD35
        return MODELS[name], f"model {name}, as given; {how}"
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _from_folder(path)
    if HUB_ID.fullmatch(name):
        spec = dataclasses.replace(MODELS["sd35"], name=name, pipeline=name)
        return spec, f"model {name}, a hub id (there is no folder of that name), with the rewards of sd35"
    guess = did_you_mean(name, ["auto", *MODELS]) or "."
    known = f"auto, {', '.join(MODELS)}; or the folder or hub id, owner/name, of a StableDiffusion3Pipeline"
    raise ValueError(f"unknown model {name!r}{guess} Known: {known}")


def _choose() -> tuple[ModelSpec, str]:
    import huggingface_hub

    sd35, shapes = MODELS["sd35"], MODELS["shapes"]
    absent = [repo for repo in (sd35.pipeline, sd35.reward, sd35.pixel, sd35.pixel_processor) if not is_cached(repo)]
    if not absent:
        return sd35, f"model sd35: its weights are complete in the local cache; {HOW_TO_GET_SHAPES}"
    if huggingface_hub.is_offline_mode():
        refusal = "HF_HUB_OFFLINE is set"
    elif (refusal := next(iter(hub_refusals(absent).values()), None)) is None:
        return sd35, f"model sd35: the hub grants access, missing weights are downloaded; {HOW_TO_GET_SHAPES}"
    why = f"{absent[0]} is not complete in the local cache, and {refusal}"
    return shapes, f"model shapes, the small embedded world: {why}; {HOW_TO_GET_SD35}"


def cached_folder(repository: str) -> Path | None:
    """Return the folder of a repository in the local hub cache, which may lack files; None if there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError):  # the hub client raises these if it is not in the cache
        return None


def is_cached(repository: str) -> bool:
    """Return whether the local hub cache holds all needed files of `repository`, one of the hub ids of `sd35`."""
    folder, sd35 = cached_folder(repository), MODELS["sd35"]
    if folder is None:
        return False
    if repository == sd35.pipeline:
        return not missing_files(folder)
    if repository == sd35.pixel:
        return not missing_weights(folder, "model")
    processor = ("preprocessor_config.json", "tokenizer.json")
    files = processor if repository == sd35.pixel_processor else RELEASED_REWARD_FILES
    return all((folder / file).exists() for file in files)


def hub_refusals(repositories: Sequence[str], *, seconds: float = HUB_SECONDS) -> dict[str, str]:
    """Return {repository: reason} of those that the hub does not grant access to. Waits at most `seconds`.

    Daemon threads ask the hub, because the hub client exceeds its own timeouts if no name server answers.
    """
    from huggingface_hub import auth_check
    from huggingface_hub.errors import HfHubHTTPError

    answers: queue.Queue[tuple[str, str | None]] = queue.Queue()

    def ask(repository: str) -> None:
        try:
            auth_check(repository)
            answers.put((repository, None))
        except Exception as error:  # any error means that the weights cannot be downloaded
            lines = str(error).strip().splitlines() or [""]
            how = "does not grant" if isinstance(error, HfHubHTTPError) else "cannot be asked for"
            answers.put((repository, f"the hub {how} {repository} ({type(error).__name__}: {lines[0][:160]})"))

    end = time.monotonic() + seconds
    for repository in repositories:
        threading.Thread(target=ask, args=(repository,), daemon=True).start()
    found = dict.fromkeys(repositories, f"the hub did not answer within {seconds:g} s")
    for _ in repositories:
        try:
            repository, refusal = answers.get(timeout=max(0, end - time.monotonic()))
        except queue.Empty:
            break
        found[repository] = refusal
    return {repository: refusal for repository, refusal in found.items() if refusal}


def _from_folder(path: Path) -> tuple[ModelSpec, str]:
    """Return the folder's model, and a message that names the folder and says how to get `sd35` or `shapes`.

    path: a pipeline folder, or a folder with one in it, named pipeline or stable-diffusion-3.5-medium. Rewards and
    processors are folders beside the pipeline, named dinalrm, pickscore (or pixel), clip_h, hpsv3 and so on, or like
    their hub repositories. What is not there comes from the hub. The embedded world is recognised by its vocabulary.
    """
    base = MODELS["sd35"]
    inner = [path / name for name in ("pipeline", base.pipeline.rpartition("/")[2]) if (path / name).is_dir()]
    pipeline = path if (path / "model_index.json").exists() or not inner else inner[0]
    _check_pipeline(pipeline)
    own = dict(name=str(path), pipeline=str(pipeline), weights=str(pipeline.absolute().parent))
    native = _native_size(pipeline)
    if _is_shapes(pipeline):
        root, tokens = pipeline.parent, pipeline / "tokenizer_3" / "tokenizer_config.json"
        length = _number(tokens, "model_max_length") if tokens.exists() else MODELS["shapes"].text_length
        own |= dict(reward=str(root / "dinalrm"), pixel=str(root / "pixel"), text_length=length)
        spec = dataclasses.replace(MODELS["shapes"], **own, height=native, width=native, reward_size=native)
        return spec, f"model in {path}, an embedded world with its own rewards; {HOW_TO_GET_SD35}"
    size, reward_size = min(base.height, native), min(base.reward_size, native)
    spec = dataclasses.replace(base, **own, height=size, width=size, reward_size=reward_size)
    reward, pixel = spec.find(base.reward, "dinalrm"), spec.find(base.pixel, "pickscore", "pixel")
    complete = (Path(pixel) / "preprocessor_config.json").is_file()
    processor = None if complete else spec.find(base.pixel_processor, "clip_h")
    spec = dataclasses.replace(spec, reward=reward, pixel=pixel, pixel_processor=processor)
    return spec, f"pipeline in {pipeline}, latent reward {reward}, PickScore {pixel}; {HOW_TO_GET_SHAPES}"


def _is_shapes(pipeline: Path) -> bool:
    """Return whether a pipeline is one of the embedded world, whose tokenizers know the words of its captions only."""
    vocabulary = read_json(pipeline / "text_encoder" / "config.json").get("vocab_size")
    return isinstance(vocabulary, int) and vocabulary < SHAPES_VOCABULARY


def _check_pipeline(pipeline: Path) -> None:
    """Raise ValueError unless the folder holds an SD3 pipeline and its configs; `reward.needs` looks for weights."""
    if not all((pipeline / part / "config.json").is_file() for part in ("transformer", "vae", "text_encoder")):
        check_files(pipeline)
    kind = read_json(pipeline / "model_index.json").get("_class_name")
    if kind != "StableDiffusion3Pipeline":
        raise ValueError(f"{pipeline}: got a {kind}; expected a StableDiffusion3Pipeline (SD3 or SD3.5)")


def check_sides(spec: ModelSpec, **sides: int | None) -> None:
    """Raise ValueError unless the model takes images with these sides in pixels, by name; None is not checked.

    A side must be a multiple of the VAE's factor times the patch size, and must not exceed the table of positions of
    the transformer. Only config.json files are read. Nothing is checked for an uncached hub id but SD3.5 Medium's.
    """
    transformer, vae = (_config_of(spec.pipeline, part) for part in ("transformer", "vae"))
    if transformer is not None and vae is not None:
        multiple = _vae_factor(vae) * _number(transformer, "patch_size")
        largest = multiple * _number(transformer, "pos_embed_max_size")
    elif spec.pipeline == MODELS["sd35"].pipeline:
        multiple, largest = 16, 6144  # patch_size 2 x VAE factor 8; pos_embed_max_size 384
    else:
        return
    for name, side in sides.items():
        if side is not None and (side % multiple or not multiple <= side <= largest):
            raise ValueError(
                f"{name}: got {side} pixels; expected a multiple of {multiple} from {multiple} to {largest}, which the "
                f"positions of model {spec.name} cover"
            )


def _config_of(pipeline: str, part: str) -> Path | None:
    """Return the path of a component's config.json in a pipeline folder or the hub cache; None if it is not there."""
    if Path(pipeline).is_dir():
        path = Path(pipeline) / part / "config.json"
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(pipeline, f"{part}/config.json")
    return Path(found) if isinstance(found, str) else None


def _native_size(pipeline: Path) -> int:
    latent_size = _number(pipeline / "transformer" / "config.json", "sample_size")
    return latent_size * _vae_factor(pipeline / "vae" / "config.json")


def _vae_factor(path: Path) -> int:
    """Return the number of pixels per latent along a side, from the config.json of a VAE."""
    widths = read_json(path).get("block_out_channels")
    if not isinstance(widths, list) or not widths:
        raise ValueError(f"{path}: block_out_channels: got {widths!r:.80}; expected a list of widths")
    return 2 ** (len(widths) - 1)


def _number(path: Path, key: str) -> int:
    value = read_json(path).get(key)
    try:
        check_integer(key, value, low=1)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    return value
