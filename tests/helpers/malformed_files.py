"""Malformed files and folders: rewards, pipelines, prompts, images, pairs, metrics."""

import io
import json
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from malformed import Bomb, Case, World, latents, with_value
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_lrm import one_file
from transformers import CLIPTokenizer

from dinalrm_align import LatentReward
from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.data.prompts import read_captioned_images, read_prompts
from dinalrm_align.data.source import ImagePairs
from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.models.specs import resolve_model
from dinalrm_align.reward.lrm import LrmReward
from dinalrm_align.reward.needs import check_sources
from dinalrm_align.reward.pixel.clip import ClipReward

WEIGHTS = "model.safetensors"
UNREADABLE = (ValueError, OSError)
"""Libraries differ in which of these they raise for a broken file."""
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def load(make: Callable[[World], object], *, with_pipeline: bool = True, **options):
    """A reward loaded from what `make` returns."""

    def call(world: World) -> object:
        given = {"pipeline": world.pipeline} if with_pipeline else {}
        return LatentReward.from_pretrained(make(world), **given, **options, local_files_only=True)

    return call


def changed(**changes: object):
    """The tiny reward with other values in its config.json."""
    return load(lambda w: w.with_json(w.reward_dir, "config.json", **changes))


def configured(content: bytes | str):
    """The tiny reward with these bytes as config.json."""
    return load(lambda w: w.with_bytes(w.reward_dir, "config.json", content))


def weights(content, folder: str = "reward_dir", name: str = WEIGHTS):
    """A reward with other bytes as its weights."""
    return load(lambda w: w.with_bytes(vars_of(w, folder), name, content(w) if callable(content) else content))


def cut(share: float):
    return load(lambda w: w.with_bytes(w.reward_dir, WEIGHTS, lambda data: data[: int(share * len(data))]))


def tensors(change):
    return load(lambda w: w.with_tensors(w.reward_dir, WEIGHTS, change))


def released(**changes: object):
    return load(lambda w: w.with_json(w.released_dir, "config.json", **changes))


def vars_of(world: World, name: str) -> Path:
    return {"reward_dir": lambda: world.reward_dir, "released_dir": lambda: world.released_dir}[name]()


def base(identifier: str | Callable[[World], str], **options):
    """The tiny reward, loaded by itself, with another base model named in its config."""

    def make(world: World) -> Path:
        named = identifier(world) if callable(identifier) else identifier
        return world.with_json(world.reward_dir, "config.json", base_model_id=named)

    return load(make, with_pipeline=False, **options)


def pipeline(change: Callable[[World], Path]):
    """The tiny reward on a changed copy of the pipeline folder."""
    return base(lambda w: str(change(w)))


def bomb(world: World) -> Bomb:
    return Bomb(world.root / "unpickled")


def bomb_bytes(world: World) -> bytes:
    return pickle.dumps(bomb(world))


def bomb_zip(world: World) -> bytes:
    path = world.fresh() / "bomb.pt"
    torch.save({"head": bomb(world)}, path)
    return path.read_bytes()


def from_hub(world: World) -> object:
    """A reward that was downloaded and names a folder of this machine as its base model."""
    folder = world.with_json(world.reward_dir, "config.json", base_model_id="../../../etc")
    with patch("huggingface_hub.snapshot_download", lambda *_, **__: str(folder)):
        return LatentReward.from_pretrained("somebody/reward", pipeline=world.pipeline)


def drop(name: str):
    return lambda t: t.pop(next(key for key in t if name in key))


def replace(name: str, make: Callable[[torch.Tensor], torch.Tensor]):
    def change(found: dict[str, torch.Tensor]) -> None:
        key = next(key for key in found if name in key)
        found[key] = make(found[key])

    return change


def without(folder: Path, world: World, *names: str) -> Path:
    copied = world.copy(folder)
    for name in names:
        (copied / name).unlink()
    return copied


def header(size: int) -> bytes:
    return struct.pack("<Q", size) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4)


PLACES = [
    Case("a folder that is not there", load(lambda w: w.root / "absent"), ValueError, "reward"),
    Case("an empty folder", load(lambda w: w.fresh()), FileNotFoundError, "config.json"),
    Case("a file", load(lambda w: w.file("reward.json", "{}")), ValueError, "reward.json"),
    Case("nothing", load(lambda w: ""), ValueError, "reward"),
    Case("blanks", load(lambda w: "  "), ValueError, "reward"),
    Case("a name with a blank", load(lambda w: "some body/reward"), ValueError, "some body/reward"),
    Case("a name without owner", load(lambda w: "reward"), ValueError, "reward"),
    Case("three parts", load(lambda w: "x/y/z"), ValueError, "x/y/z"),
    Case("an address", load(lambda w: "https://huggingface.co/x/y"), ValueError, "https://huggingface.co/x/y"),
    Case("a way out", load(lambda w: "../../../etc/passwd"), ValueError, "../../../etc/passwd"),
    Case("a NUL byte", load(lambda w: "a\0b/c"), ValueError, "a\\x00b/c"),
    Case("a dash first", load(lambda w: "-x/y"), ValueError, "-x/y"),
    Case("a hub id that is not cached", load(lambda w: "nobody-here/nothing-there"), OSError, "nobody-here/nothing-there"),
]  # fmt: skip

CONFIGS = [
    Case("not JSON", configured("sigma: 0.4"), ValueError, "config.json"),
    Case("empty", configured(""), ValueError, "config.json"),
    Case("cut short", configured('{"sigma": 0.'), ValueError, "config.json"),
    Case("a list", configured("[]"), ValueError, "list"),
    Case("a number", configured("1"), ValueError, "int"),
    Case("an empty object", configured("{}"), ValueError, "base_model_id"),
    Case("not UTF-8", configured(b'{"a": "\xff\xfe"}'), ValueError, "config.json UTF-8"),
    Case("NUL bytes", configured(bytes(64)), ValueError, "config.json NUL"),
    Case("a key twice", configured('{"sigma": 0.1, "sigma": 0.9}'), ValueError, "sigma"),
    Case("endless nesting", configured("[" * 100_000), ValueError, "config.json"),
    Case("a folder", load(lambda w: folder_for_file(w)), FileNotFoundError, "config.json"),
    Case("a missing key", changed(sigma=...), ValueError, "sigma"),
    Case("a missing nested key", changed(head__width=...), ValueError, "head width"),
    Case("an unknown key", changed(sigm=0.4), ValueError, "sigm sigma"),
    Case("an unknown nested key", changed(lora__ranks=4), ValueError, "lora rank"),
    Case("a section that is none", changed(lora=4), ValueError, "lora int 4"),
    Case("a section of null", changed(head=None), ValueError, "head NoneType"),
    Case("a number as text", changed(sigma="0.4"), ValueError, "sigma str 0.4"),
    Case("a number as truth", changed(num_layers=True), ValueError, "num_layers bool"),
    Case("NaN", changed(score_bias=math.nan), ValueError, "score_bias nan"),
    Case("infinity", changed(vae_scaling_factor=math.inf), ValueError, "vae_scaling_factor inf"),
    Case("beyond floats", changed(score_scale=10**400), ValueError, "score_scale"),
    Case("sigma above 1", changed(sigma=400), ValueError, "sigma 400"),
    Case("taps beyond the layers", changed(visual_taps=[1, 9]), ValueError, "visual_taps 1 9"),
    Case("more layers than blocks", changed(num_layers=9), ValueError, "num_layers 9 4"),
    Case("another rank", changed(lora__rank=8), ValueError, "4 16 8"),
    Case("a rank of gigabytes", changed(lora__rank=10**12), ValueError, "config.json 1000000000000 16"),
    Case("queries of gigabytes", changed(head__num_queries=10**12), ValueError, "head query_tokens"),
    Case("another width", changed(head__width=10**7), ValueError, "head query_tokens"),
    Case("another tuning", changed(tuning="none"), ValueError, "model.safetensors"),
    Case("full tuning without weights", changed(tuning="full"), ValueError, "model.safetensors"),
    Case("a version of the future", changed(format_version=99), ValueError, "format_version 99"),
    Case("a base model of a number", changed(base_model_id=3), ValueError, "base_model_id int 3"),
]  # fmt: skip


def folder_for_file(world: World) -> Path:
    folder = world.fresh()
    (folder / "config.json").mkdir()
    return folder


TENSORS = [
    Case("no weights", load(lambda w: without(w.reward_dir, w, WEIGHTS)), FileNotFoundError, "model.safetensors"),
    Case("an empty file", weights(b""), ValueError, "model.safetensors"),
    Case("text", weights("weights"), ValueError, "model.safetensors"),
    Case("cut in the header", cut(0.0005), ValueError, "model.safetensors"),
    Case("cut in the middle", cut(0.5), ValueError, "model.safetensors"),
    Case("cut at the end", load(lambda w: w.with_bytes(w.reward_dir, WEIGHTS, lambda d: d[:-1])), ValueError, "model.safetensors"),
    Case("more than the header says", load(lambda w: w.with_bytes(w.reward_dir, WEIGHTS, lambda d: d + b"x")), ValueError, "model.safetensors"),
    Case("a header of 2^60 bytes", weights(header(2**60)), ValueError, "model.safetensors"),
    Case("a header of 2^64 - 1 bytes", weights(header(2**64 - 1)), ValueError, "model.safetensors"),
    Case("a header that is no JSON", weights(struct.pack("<Q", 4) + b"abcd"), ValueError, "model.safetensors"),
    Case("a pickle", weights(bomb_bytes), ValueError, "model.safetensors"),
    Case("a pickle of torch", weights(bomb_zip), ValueError, "model.safetensors"),
    Case("a tensor missing", tensors(drop("lora_A")), ValueError, "model.safetensors backbone"),
    Case("the head missing", tensors(lambda t: [t.pop(k) for k in list(t) if k.startswith("head.")]), ValueError, "model.safetensors head"),
    Case("a tensor too many", tensors(lambda t: t.update(surprise=latents(1))), ValueError, "surprise"),
    Case("a tensor of another shape", tensors(replace("head.head.weight", lambda t: t[:, :4].clone())), ValueError, "model.safetensors"),
    Case("a tensor of another rank", tensors(replace("query_tokens", lambda t: t[0].clone())), ValueError, "head query_tokens"),
    Case("integers", tensors(replace("head.head.weight", lambda t: t.long())), ValueError, "torch.int64"),
    Case("complex", tensors(replace("head.head.weight", lambda t: t.to(torch.complex64))), ValueError, "torch.complex64"),
    Case("NaN", tensors(replace("head.head.weight", lambda t: with_value(t, math.nan))), ValueError, "model.safetensors NaN"),
    Case("infinity", tensors(replace("lora_B", lambda t: with_value(t, math.inf))), ValueError, "model.safetensors NaN"),
    Case("no tensors", tensors(lambda t: t.clear()), ValueError, "model.safetensors"),
]  # fmt: skip

RELEASED = [
    Case("model a list", released(model=[]), ValueError, "config.json"),
    Case("no head", released(model__reward_head=...), ValueError, "reward_head"),
    Case("two scores", released(model__reward_head__out_dim=2), ValueError, "out_dim 1"),
    Case("frozen as text", released(model__freeze_backbone="no"), ValueError, "model freeze_backbone no"),
    Case("taps as text", released(model__visual_head_idx="123"), ValueError, "visual_taps[0] str"),
    Case("taps of two kinds", released(model__text_head_idx=[1, "2"]), ValueError, "config.json"),
    Case("training a list", released(training=[]), ValueError, "config.json"),
    Case("noise as text", released(training__add_noise="no"), ValueError, "add_noise str"),
    Case("an unknown key of ours", released(dinalrm_align__sgma=1), ValueError, "sgma"),
    Case("no head file", load(lambda w: without(w.released_dir, w, "checkpoint/rm_head.pt")), FileNotFoundError, "rm_head.pt"),
    Case("a head file of text", weights("head", "released_dir", "checkpoint/rm_head.pt"), ValueError, "rm_head.pt"),
    Case("an empty head file", weights(b"", "released_dir", "checkpoint/rm_head.pt"), ValueError, "rm_head.pt"),
    Case("a head file that runs code", weights(bomb_bytes, "released_dir", "checkpoint/rm_head.pt"), ValueError, "rm_head.pt"),
    Case("a zipped head that runs code", weights(bomb_zip, "released_dir", "checkpoint/rm_head.pt"), ValueError, "rm_head.pt"),
    Case("a head file of a list", weights(lambda w: saved(w, [1, 2]), "released_dir", "checkpoint/rm_head.pt"), ValueError, "rm_head.pt"),
    Case("no adapter", load(lambda w: without(w.released_dir, w, "checkpoint/backbone_lora/adapter_config.json")), FileNotFoundError, "adapter_config.json"),
    Case("another adapter", load(lambda w: w.with_json(w.released_dir, "checkpoint/backbone_lora/adapter_config.json", peft_type="IA3")), ValueError, "adapter_config.json LoRA"),
    Case("an adapter of no rank", load(lambda w: w.with_json(w.released_dir, "checkpoint/backbone_lora/adapter_config.json", r="4")), ValueError, "lora rank str"),
    Case("adapter weights that run code", weights(bomb_bytes, "released_dir", "checkpoint/backbone_lora/adapter_model.safetensors"), ValueError, "adapter_model.safetensors"),
]  # fmt: skip


def saved(world: World, value: object) -> bytes:
    path = world.fresh() / "value.pt"
    torch.save(value, path)
    return path.read_bytes()


BASES = [
    Case("../../../etc", base("../../../../../../../../etc"), FileNotFoundError, "config.json"),
    Case("an absolute path", base("/etc"), FileNotFoundError, "config.json SD3Transformer2DModel"),
    Case("a file", base("/etc/passwd"), ValueError, "/etc/passwd"),
    Case("a folder that is not there", base("../nowhere"), ValueError, "nowhere"),
    Case("a name with a blank", base("some body/sd3"), ValueError, "some body/sd3"),
    Case("a hub id that is not cached", base("nobody-here/nothing-there"), OSError, "nobody-here/nothing-there"),
    Case("a way out, downloaded", from_hub, ValueError, "base_model_id"),
    Case("another architecture", pipeline(lambda w: w.with_json(w.pipeline_dir, "transformer/config.json", _class_name="FluxTransformer2DModel")), ValueError, "FluxTransformer2DModel"),
    Case("the VAE's folder", pipeline(lambda w: w.pipeline_dir / "vae"), ValueError, "AutoencoderKL"),
    Case("a transformer of pickles", pipeline(lambda w: renamed(w, bomb_zip(w))), FileNotFoundError, "SD3Transformer2DModel"),
    Case("a pickle named safetensors", pipeline(lambda w: w.with_bytes(w.pipeline_dir, TRANSFORMER, bomb_bytes(w))), UNREADABLE, "SD3Transformer2DModel"),
    Case("a transformer cut short", pipeline(lambda w: w.with_bytes(w.pipeline_dir, TRANSFORMER, lambda d: d[:1000])), UNREADABLE, "SD3Transformer2DModel"),
    Case("a transformer with holes", pipeline(lambda w: w.with_tensors(w.pipeline_dir, TRANSFORMER, drop("proj_out"))), ValueError, "SD3Transformer2DModel"),
    Case("a transformer of another shape", pipeline(lambda w: w.with_tensors(w.pipeline_dir, TRANSFORMER, replace("context_embedder.weight", lambda t: t[:4].clone()))), ValueError, "SD3Transformer2DModel"),
    Case("a config of text", pipeline(lambda w: w.with_bytes(w.pipeline_dir, "transformer/config.json", "SD3")), ValueError, "config.json"),
    Case("a config without sizes", pipeline(lambda w: w.with_json(w.pipeline_dir, "transformer/config.json", num_layers="four")), ValueError, "SD3Transformer2DModel"),
    Case("no text encoders", lambda w: base(lambda w: str(w.pipeline_dir / "transformer"))(w)(latents(), ["a", "b"]), ValueError, "pipeline/transformer"),
    Case("no VAE", lambda w: base(lambda w: str(w.pipeline_dir / "transformer"))(w).score_images([Image.new("RGB", (64, 64))], ["a"]), ValueError, "vae"),
]  # fmt: skip


def renamed(world: World, pickled: bytes) -> Path:
    """The pipeline with a .bin of pickles in the place of the transformer's safetensors."""
    copied = without(world.pipeline_dir, world, TRANSFORMER)
    (copied / TRANSFORMER).with_suffix(".bin").write_bytes(pickled)
    return copied


def clip(make: Callable[[World], object]):
    def call(world: World) -> object:
        return ClipReward.from_pretrained(make(world), local_files_only=True)

    return call


def preprocessor(**changes: object):
    return clip(lambda w: str(w.with_json(w.clip_dir, "preprocessor_config.json", **changes)))


PIXEL = [
    Case("no such folder", clip(lambda w: "../absent"), ValueError, "../absent"),
    Case("nothing", clip(lambda w: ""), ValueError, "pixel"),
    Case("an empty folder", clip(lambda w: str(w.fresh())), OSError, "CLIPModel"),
    Case("another model's folder", clip(lambda w: str(w.pipeline_dir)), UNREADABLE, "CLIPModel"),
    Case("weights cut short", clip(lambda w: str(w.with_bytes(w.clip_dir, WEIGHTS, lambda d: d[:99]))), UNREADABLE, "CLIPModel"),
    Case("a pickle named safetensors", clip(lambda w: str(w.with_bytes(w.clip_dir, WEIGHTS, bomb_bytes(w)))), UNREADABLE, "CLIPModel"),
    Case("weights missing", clip(lambda w: str(w.with_tensors(w.clip_dir, WEIGHTS, drop("text_projection")))), ValueError, "['text_projection.weight']"),
    Case("config not JSON", clip(lambda w: str(w.with_bytes(w.clip_dir, "config.json", "clip"))), UNREADABLE, "CLIPModel"),
    Case("no preprocessor", clip(lambda w: str(without(w.clip_dir, w, "preprocessor_config.json"))), OSError, "preprocessor_config.json"),
    Case("preprocessor without size", preprocessor(size=...), ValueError, "preprocessor_config.json size"),
    Case("preprocessor with a mean of text", preprocessor(image_mean="0.5"), ValueError, "preprocessor mean str"),
    Case("preprocessor with std 0", preprocessor(image_std=[0.0, 1.0, 1.0]), ValueError, "std 0.0"),
    Case("preprocessor bilinear", preprocessor(resample=2), ValueError, "preprocessor_config.json 2 3"),
    Case("preprocessor a list", clip(lambda w: str(w.with_bytes(w.clip_dir, "preprocessor_config.json", "[]"))), UNREADABLE, "preprocessor_config.json"),
]  # fmt: skip


def prompts(name: str, content: bytes | str):
    def call(world: World) -> object:
        return read_prompts(world.file(name, content))

    return call


def prompts_at(make: Callable[[World], Path]):
    def call(world: World) -> object:
        return read_prompts(make(world))

    return call


PROMPTS = [
    Case("missing", prompts_at(lambda w: w.root / "absent.txt"), FileNotFoundError, "absent.txt"),
    Case("a folder", prompts_at(lambda w: w.fresh()), FileNotFoundError, "prompt"),
    Case("empty", prompts("p.txt", b""), ValueError, "p.txt"),
    Case("blank lines", prompts("p.txt", "\n \n\t\r\n"), ValueError, "p.txt"),
    Case("a byte order mark alone", prompts("p.txt", b"\xef\xbb\xbf"), ValueError, "p.txt"),
    Case("Latin-1", prompts("p.txt", "fine\nB\xe4r".encode("latin-1")), ValueError, "p.txt UTF-8 2"),
    Case("UTF-16", prompts("p.txt", "a circle".encode("utf-16")), ValueError, "p.txt UTF-8 1"),
    Case("NUL bytes", prompts("p.txt", b"one\ntwo\0\n"), ValueError, "p.txt NUL 2"),
    Case("a line of a million characters", prompts("p.txt", "one\n" + "a" * 1_000_000), ValueError, "p.txt 2 1000000"),
    Case("an image", prompts("p.txt", b"\x89PNG\r\n\x1a\n\0\0"), ValueError, "p.txt UTF-8"),
    Case("JSON in a text file", prompts("p.txt", '[{"prompt": "a"}]'), ValueError, "p.txt JSON"),
    Case("lines of JSON in a text file", prompts("p.txt", '{"prompt": "a"}\n{"prompt": "b"}'), ValueError, "p.txt JSON"),
    Case("a table in a text file", prompts("p.txt", "id,prompt\n1,a\n"), ValueError, "p.txt id,prompt .csv"),
    Case("text in a JSON file", prompts("p.json", "a cat\n"), ValueError, "p.json JSON"),
    Case("JSON without prompts", prompts("p.json", '[{"caption": "a"}]'), ValueError, "p.json 0 caption"),
    Case("half a surrogate pair", prompts("p.json", r'["a", "\ud800"]'), ValueError, "p.json 1 ud800"),
    Case("an empty prompt among others", prompts("p.jsonl", '"a"\n""'), ValueError, "p.jsonl 2"),
    Case("a table without the column", prompts("p.csv", "caption\na\n"), ValueError, "p.csv caption"),
    Case("a comma that is not quoted", prompts("p.csv", "prompt\na cat, sitting\n"), ValueError, "p.csv 2"),
    Case("an open quote", prompts("p.tsv", 'prompt\n"a\nb\n'), ValueError, "p.tsv 3"),
]  # fmt: skip


def captioned(*files: tuple[str, bytes | str]):
    def call(world: World) -> object:
        folder = world.fresh()
        for name, content in files:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return read_captioned_images(folder)

    return call


def encoded(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (64, 64), **options) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def bitmap_header(width: int, height: int) -> bytes:
    """A PNG that says that it has this size, and holds nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"IEND"
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, b"IDAT", end)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


CAPTION = ("a.txt", "a circle")


def captioned_at(folder: Path) -> object:
    return read_captioned_images(folder)


def folder_as_image(world: World) -> object:
    folder = world.fresh()
    (folder / "a.png").mkdir()
    (folder / "a.txt").write_text("a circle")
    return captioned_at(folder)


def with_chunk(kind: bytes, data: bytes, keep: int | None = None, checksum: int | None = None) -> bytes:
    """A PNG with one more chunk after its pixels. keep: bytes of the file to keep, counted from that chunk's start."""
    plain, check = encoded(), zlib.crc32(kind + data) if checksum is None else checksum
    at = plain.index(b"IEND") - 4
    file = plain[:at] + struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check) + plain[at:]
    return file if keep is None else file[: at + keep]


IMAGES = [
    Case("no folder", lambda w: captioned_at(w.root / "absent"), FileNotFoundError, "absent"),
    Case("an empty folder", captioned(), ValueError, "NAME.png"),
    Case("no caption", captioned(("a.png", encoded())), FileNotFoundError, "a.txt"),
    Case("an empty caption", captioned(("a.png", encoded()), ("a.txt", "\n")), ValueError, "a.txt"),
    Case("an empty file", captioned(("a.png", b""), CAPTION), ValueError, "a.png"),
    Case("text posing as PNG", captioned(("a.png", "not an image"), CAPTION), ValueError, "a.png"),
    Case("a PNG cut short", captioned(("a.png", encoded()[:200]), CAPTION), ValueError, "a.png"),
    Case("a JPEG cut short", captioned(("a.jpg", encoded("JPEG")[:600]), CAPTION), ValueError, "a.jpg"),
    Case("a spoilt PNG", captioned(("a.png", encoded()[:60] + b"spoilt" + encoded()[66:]), CAPTION), ValueError, "a.png"),
    Case("10^10 pixels", captioned(("a.png", bitmap_header(100_000, 100_000)), CAPTION), ValueError, "a.png"),
    Case("a header alone", captioned(("a.png", bitmap_header(64, 64)), CAPTION), ValueError, "a.png"),
    Case("32 bits", captioned(("a.png", encoded("TIFF", "I")), CAPTION), ValueError, "a.png I 8"),
    Case("floats", captioned(("a.png", encoded("TIFF", "F")), CAPTION), ValueError, "a.png F 8"),
    Case("a row of pixels", captioned(("a.png", encoded(size=(64, 1))), CAPTION), ValueError, "a.png 64 1"),
    Case("a column of pixels", captioned(("a.jpg", encoded("JPEG", size=(1, 64))), CAPTION), ValueError, "a.jpg 1 64"),
    Case("a WebP cut short", captioned(("a.webp", encoded("WEBP")[:200]), CAPTION), ValueError, "a.webp"),
    Case("a GIF cut short", captioned(("a.png", encoded("GIF", "L")[:900]), CAPTION), ValueError, "a.png"),
    Case("a TIFF cut short", captioned(("a.png", encoded("TIFF")[:900]), CAPTION), ValueError, "a.png"),
    Case("a BMP cut short", captioned(("a.png", encoded("BMP")[:900]), CAPTION), ValueError, "a.png"),
    Case("EXIF cut short", captioned(("a.png", with_chunk(b"eXIf", bytes(99), 50)), CAPTION), ValueError, "a.png"),
    Case("EXIF of another checksum", captioned(("a.png", with_chunk(b"eXIf", b"II", checksum=7)), CAPTION), ValueError, "a.png eXIf"),
    Case("text that unpacks to 4 MB", captioned(("a.png", with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22)))), CAPTION), ValueError, "a.png"),
    Case("a folder named .png", folder_as_image, FileNotFoundError, "a.png"),
]  # fmt: skip


def jsonl(content: bytes | str):
    def call(world: World) -> object:
        path = world.file("pairs.jsonl", content)
        (path.parent / "a.png").write_bytes(encoded())
        return jsonl_at(path)

    return call


def record(**changes: object) -> str:
    values = {"prompt": "a circle", "chosen": "a.png", "rejected": "a.png", **changes}
    return json.dumps({key: value for key, value in values.items() if value is not ...})


JSONL = [
    Case("missing", lambda w: jsonl_at(w.root / "absent.jsonl"), FileNotFoundError, "absent.jsonl"),
    Case("a folder", lambda w: jsonl_at(folder_for_file(w) / "config.json"), FileNotFoundError, "config.json"),
    Case("empty", jsonl(""), ValueError, "pairs.jsonl"),
    Case("not JSON", jsonl(record() + "\nchosen: a.png"), ValueError, "pairs.jsonl 2"),
    Case("a list", jsonl("[1, 2]"), ValueError, "pairs.jsonl 1 list"),
    Case("no prompt", jsonl(record(prompt=...)), ValueError, "prompt"),
    Case("a prompt of numbers", jsonl(record(prompt=[1])), ValueError, "prompt [1]"),
    Case("a prompt of a million characters", jsonl(record(prompt="a" * 1_000_000)), ValueError, "1000000 characters"),
    Case("no rejected image", jsonl(record(rejected=...)), ValueError, "rejected"),
    Case("an image that is not there", jsonl(record(chosen="b.png")), FileNotFoundError, "b.png"),
    Case("a folder as image", jsonl(record(chosen=".")), FileNotFoundError, "pairs.jsonl"),
    Case("a label of 2", jsonl(record(label=2)), ValueError, "label 2"),
    Case("a label of truth", jsonl(record(label=True)), ValueError, "label"),
    Case("a label of NaN", jsonl(record(label=math.nan)), ValueError, "label nan"),
    Case("a label of 10^400", jsonl(record(label=10**400)), ValueError, "pairs.jsonl 1 label"),
    Case("votes 0:0", jsonl(record(votes=[0, 0])), ValueError, "pairs.jsonl 1 votes"),
    Case("votes of NaN", jsonl(record(votes=[math.nan, 1])), ValueError, "votes nan"),
    Case("three votes", jsonl(record(votes=[1, 2, 3])), ValueError, "votes"),
    Case("a confidence of infinity", jsonl(record(confidence=math.inf)), ValueError, "confidence inf"),
    Case("scores of a list", jsonl(record(scores=[])), ValueError, "scores"),
    Case("half a score", jsonl(record(scores={"clip": [1, None]})), ValueError, "scores.clip None"),
    Case("a caption that is no Unicode", jsonl(record(prompt="\ud800")), ValueError, "pairs.jsonl 1 prompt ud800"),
    Case("a blank caption", jsonl(record(prompt=" ")), ValueError, "pairs.jsonl 1 prompt"),
    Case("a path that is no Unicode", jsonl(record(chosen="\ud800.png")), ValueError, "pairs.jsonl 1 chosen"),
    Case("a concept of numbers", jsonl(record(concept=3)), ValueError, "concept 3"),
    Case("a key twice", jsonl('{"prompt": "a", "prompt": "b"}'), ValueError, "prompt"),
    Case("not UTF-8", jsonl(b"\xff\xfe{}"), ValueError, "pairs.jsonl 1 JSON"),
    Case("endless nesting", jsonl('{"a":' * 100_000), ValueError, "pairs.jsonl"),
]  # fmt: skip


def jsonl_at(path: Path) -> object:
    return ImagePairs(path, encode_images=None, encode_prompts=None, manifest=None, size=(64, 64), batch_size=1)


def pairs(make: Callable[[World], Path], **options: object):
    """A directory of latent pairs, opened and its first batch read."""

    def call(world: World) -> object:
        return LatentPairs(make(world), **{"batch_size": 2, **options}).batch_at(0)

    return call


def index(**changes: object):
    return pairs(lambda w: w.with_json(w.pairs_dir, "index.json", **changes))


def listed(world: World, kind: str, **changes: object) -> Path:
    """The pairs with other values for the first shard of a kind in the index."""
    first = json.loads((world.pairs_dir / "index.json").read_text())[kind][0]
    return world.with_json(world.pairs_dir, "index.json", **{kind: [{**first, **changes}]})


def groups(change):
    return pairs(lambda w: w.with_tensors(w.pairs_dir, "groups.safetensors", change))


def shard(name: str, change):
    return pairs(lambda w: w.with_tensors(w.pairs_dir, name, change))


def filled(name: str, value: float):
    return replace(name, lambda t: torch.full_like(t, value))


SHARD, TEXT = "latents-00000.safetensors", "text-00000.safetensors"

PAIRS = [
    Case("no such directory", pairs(lambda w: w.root / "absent"), FileNotFoundError, "index.json"),
    Case("no index", pairs(lambda w: w.fresh()), FileNotFoundError, "index.json"),
    Case("an index of text", pairs(lambda w: w.with_bytes(w.pairs_dir, "index.json", "index")), ValueError, "index.json"),
    Case("an index of a list", pairs(lambda w: w.with_bytes(w.pairs_dir, "index.json", "[]")), ValueError, "index.json"),
    Case("another format", index(format="webdataset"), ValueError, "webdataset"),
    Case("no manifest", index(manifest=...), ValueError, "index.json"),
    Case("a manifest too short", index(manifest__text_length=...), ValueError, "text_length"),
    Case("a manifest of text", index(manifest__text_length="14"), ValueError, "manifest text_length str"),
    Case("encoders of a list", index(manifest__encoded_with=[1]), ValueError, "encoded_with"),
    Case("an encoder of text", index(manifest__encoded_with={"vae": "mine"}), ValueError, "encoded_with vae"),
    Case("an encoder without values", index(manifest__encoded_with={"vae": {"source": "a", "tensors": 3}}), ValueError, "values"),
    Case("a manifest of NaN", index(manifest__vae_scaling_factor=math.nan), ValueError, "manifest vae_scaling_factor nan"),
    Case("shards a number", index(latents=3), ValueError, "index.json"),
    Case("concepts a number", index(concepts=3), ValueError, "concepts int 3"),
    Case("concepts of numbers", index(concepts=[1]), ValueError, "concepts[0] int 1"),
    Case("a shard's rows as text", pairs(lambda w: listed(w, "latents", count="8")), ValueError, "shard count str"),
    Case("no shards", index(latents=[]), ValueError, "0 shards"),
    Case("a shard too many rows", pairs(lambda w: listed(w, "latents", count=9)), ValueError, "index.json 9"),
    Case("a shard of no rows", pairs(lambda w: listed(w, "latents", count=0)), ValueError, "shard count 0"),
    Case("a shard of another height", pairs(lambda w: listed(w, "latents", height=16)), ValueError, "16 8"),
    Case("a shard out of the directory", pairs(lambda w: listed(w, "latents", file="../pipeline/x")), ValueError, "shard file"),
    Case("a shard of /etc", pairs(lambda w: listed(w, "text", file="/etc/passwd")), ValueError, "/etc/passwd"),
    Case("a shard that is not there", pairs(lambda w: listed(w, "latents", file="b.safetensors")), FileNotFoundError, "index.json b.safetensors"),
    Case("an unknown key of a shard", pairs(lambda w: listed(w, "latents", depth=3)), ValueError, "depth"),
    Case("a shard cut short", pairs(lambda w: w.with_bytes(w.pairs_dir, SHARD, lambda d: d[:-7])), UNREADABLE, "latents-00000.safetensors"),
    Case("a shard of pickles", pairs(lambda w: w.with_bytes(w.pairs_dir, SHARD, bomb_bytes(w))), UNREADABLE, "latents-00000.safetensors"),
    Case("a shard of other tensors", shard(SHARD, lambda t: t.update(images=t.pop("latents"))), ValueError, "latents"),
    Case("a shard of rank 3", shard(SHARD, replace("latents", lambda t: t.flatten(2))), ValueError, "latents F32 8 16 64"),
    Case("a shard of integers", shard(SHARD, replace("latents", lambda t: t.long())), ValueError, "latents-00000.safetensors I64"),
    Case("a shard of NaN", shard(SHARD, filled("latents", math.nan)), ValueError, "latents"),
    Case("text of NaN", shard(TEXT, filled("pooled", math.nan)), ValueError, "pooled_prompt_embeds"),
    Case("text without pooled", shard(TEXT, drop("pooled")), ValueError, "pooled_prompt_embeds"),
    Case("text of fewer rows", shard(TEXT, replace("pooled", lambda t: t[:2].clone())), ValueError, "pooled_prompt_embeds 2"),
    Case("prompts not JSON", pairs(lambda w: w.with_bytes(w.pairs_dir, "prompts.json", "one")), ValueError, "prompts.json"),
    Case("prompts too few", pairs(lambda w: w.with_bytes(w.pairs_dir, "prompts.json", '["a"]')), ValueError, "prompts.json 1"),
    Case("prompts of numbers", pairs(lambda w: w.with_bytes(w.pairs_dir, "prompts.json", "[1, 2, 3, 4]")), ValueError, "prompts.json 4"),
    Case("no groups", pairs(lambda w: without(w.pairs_dir, w, "groups.safetensors")), FileNotFoundError, "groups.safetensors"),
    Case("groups cut short", pairs(lambda w: w.with_bytes(w.pairs_dir, "groups.safetensors", b"x")), UNREADABLE, "groups.safetensors"),
    Case("a column missing", groups(drop("label")), ValueError, "groups.safetensors"),
    Case("a column too short", groups(replace("label", lambda t: t[:1].clone())), ValueError, "groups.safetensors"),
    Case("rows as floats", groups(replace("chosen", lambda t: t.float())), ValueError, "chosen torch.float32"),
    Case("a prompt out of range", groups(filled("prompt", 99)), ValueError, "prompt 99"),
    Case("a shard out of range", groups(filled("shard", -1)), ValueError, "shard -1"),
    Case("images beyond the shard", groups(filled("first", 7)), ValueError, "groups.safetensors"),
    Case("pairs beyond the table", groups(filled("first_pair", 4)), ValueError, "first_pair"),
    Case("a rejected row of another group", groups(filled("rejected", 2)), ValueError, "rejected 2"),
    Case("a label of 2", groups(filled("label", 2.0)), ValueError, "label 2"),
    Case("a label of NaN", groups(filled("label", math.nan)), ValueError, "label nan"),
    Case("a concept that has no name", groups(filled("concept", 5)), ValueError, "concept 5"),
    Case("a batch of nothing", pairs(lambda w: w.pairs_dir, batch_size=0), ValueError, "batch_size 0"),
    Case("a batch of more than there is", pairs(lambda w: w.pairs_dir, batch_size=99), ValueError, "batch_size 99"),
    Case("a seed below 0", pairs(lambda w: w.pairs_dir, seed=-1), ValueError, "seed -1"),
    Case("more held out than there is", pairs(lambda w: w.pairs_dir, held_out_prompts=9), ValueError, "9 4"),
]  # fmt: skip


def lora(change: Callable[[World, Path], object]):
    """A policy's LoRA, saved, changed and loaded."""

    def call(world: World) -> object:
        folder = world.fresh()
        world.policy.save_lora(folder)
        change(world, folder / "pytorch_lora_weights.safetensors")
        return world.policy.load_lora(folder)

    return call


TO_Q = "transformer.transformer_blocks.0.attn.to_q"


def altered(change: Callable[[dict[str, torch.Tensor]], object], metadata: dict[str, str] | None = None):
    """The LoRA with other tensors, and without metadata unless it is given."""

    def call(world: World, path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata=metadata)

    return call


def with_metadata(config: dict[str, object], tensors: dict[str, torch.Tensor] | None = None):
    return altered(lambda t: t.update(tensors or {}), {"lora_adapter_metadata": json.dumps(config)})


def wider(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{TO_Q}.lora_A.weight"] = torch.ones(2, 32)


def higher(tensors: dict[str, torch.Tensor]) -> None:
    shapes = {"A": (3, 16), "B": (16, 3)}
    tensors |= {f"{TO_Q}.lora_{letter}.weight": torch.ones(shape) for letter, shape in shapes.items()}


LORA = [
    Case("missing", lora(lambda w, p: p.unlink()), OSError, "pytorch_lora_weights.safetensors LoRA"),
    Case("cut short", lora(lambda w, p: p.write_bytes(p.read_bytes()[:500])), UNREADABLE, "pytorch_lora_weights.safetensors LoRA"),
    Case("a pickle", lora(lambda w, p: p.write_bytes(bomb_bytes(w))), UNREADABLE, "pytorch_lora_weights.safetensors LoRA"),
    Case("another rank", lora(lambda w, p: resaved(p, {"lora_adapter_metadata": '{"transformer.r": 9}'})), ValueError, "rank 9"),
    Case("metadata a list", lora(lambda w, p: resaved(p, {"lora_adapter_metadata": "[1]"})), ValueError, "pytorch_lora_weights.safetensors LoRA"),
    Case("a value of NaN", lora(altered(replace("lora_B", lambda t: t.fill_(math.nan)))), ValueError, "pytorch_lora_weights.safetensors finite"),
    Case("a matrix missing", lora(altered(drop("lora_B"))), ValueError, "lora_B.weight pytorch_lora_weights.safetensors"),
    Case("two ranks in a layer", lora(altered(replace("lora_A", lambda t: t[:1].clone()))), ValueError, "rank pytorch_lora_weights.safetensors"),
    Case("of a text encoder as well", lora(altered(lambda t: t.update({"text_encoder.q_proj.alpha": torch.ones(())}))), ValueError, "text_encoder.q_proj"),
    Case("with a bias", lora(altered(lambda t: t.update({"transformer.x.lora_B.bias": torch.ones(2)}))), ValueError, "x.lora_B.bias"),
    Case("with DoRA", lora(altered(lambda t: t.update({"transformer.x.lora_magnitude_vector.weight": torch.ones(2)}))), ValueError, "x.lora_magnitude_vector.weight"),
    Case("two alphas", lora(with_metadata({"transformer.lora_alpha": 9}, {f"{TO_Q}.alpha": torch.tensor(2.0)})), ValueError, "alpha 2 9"),
    Case("alpha a word", lora(with_metadata({"transformer.lora_alpha": "x"})), ValueError, "pytorch_lora_weights.safetensors LoRA"),
    Case("patterns a word", lora(with_metadata({"transformer.rank_pattern": "x"})), ValueError, "pytorch_lora_weights.safetensors LoRA"),
    Case("alpha not finite", lora(with_metadata({"transformer.lora_alpha": math.inf})), ValueError, "finite pytorch_lora_weights.safetensors"),
    Case("an alpha of three values", lora(altered(lambda t: t.update({f"{TO_Q}.alpha": torch.ones(3)}))), ValueError, "pytorch_lora_weights.safetensors LoRA"),
    Case("a layer named twice", lora(altered(lambda t: t.update({n.removeprefix("transformer."): 3 * v for n, v in t.items()}))), ValueError, "tensors more one A B pytorch_lora_weights.safetensors"),
    Case("whole numbers", lora(altered(replace("lora_A", lambda t: t.to(torch.int8)))), ValueError, "torch.int8 floating"),
    Case("of rank 0", lora(altered(lambda t: t.update({f"{TO_Q}.lora_A.weight": torch.ones(0, 32), f"{TO_Q}.lora_B.weight": torch.ones(32, 0)}))), ValueError, "rank pytorch_lora_weights.safetensors"),
    Case("of no layers", lora(altered(lambda t: t.clear())), ValueError, "pytorch_lora_weights.safetensors no tensors"),
    Case("of a UNet", lora(altered(lambda t: t.update({"unet.down.lora_A.weight": torch.ones(2, 4), "unet.down.lora_B.weight": torch.ones(4, 2)}))), ValueError, "unet.down to_q"),
    Case("of another width", lora(altered(wider)), ValueError, f"{TO_Q.removeprefix('transformer.')} channels 32"),
    Case("of a larger rank", lora(altered(higher)), ValueError, "rank 3 2 policy.rank"),
    Case("of peft without its config", lora(lambda w, p: p.rename(p.with_name("adapter_model.safetensors"))), FileNotFoundError, "adapter_config.json"),
    Case("with DoRA by its config", lora(with_metadata({"transformer.use_dora": True})), ValueError, "use_dora True"),
]  # fmt: skip


def resaved(path: Path, metadata: dict[str, str] | None) -> None:
    save_file(load_file(path), path, metadata=metadata)


def model(make: Callable[[World], object]):
    def call(world: World) -> object:
        return resolve_model(str(make(world)))

    return call


def weights_of(make: Callable[[World], object]):
    """What a command does before it loads: look for the files of the model."""

    def call(world: World) -> object:
        return check_sources(resolve_model(str(make(world)))[0], {})

    return call


def indexed(world: World, content: str) -> Path:
    """The pipeline with an index in the place of the transformer's weights."""
    copied = without(world.pipeline_dir, world, TRANSFORMER)
    (copied / f"{TRANSFORMER}.index.json").write_text(content)
    return copied


MODELS = [
    Case("nothing", model(lambda w: ""), ValueError, "model"),
    Case("a near name", model(lambda w: "shape"), ValueError, "shapes"),
    Case("three parts", model(lambda w: "x/y/z"), ValueError, "x/y/z"),
    Case("an empty folder", model(lambda w: w.fresh()), ValueError, "model_index.json"),
    Case("an index of text", model(lambda w: w.with_bytes(w.pipeline_dir, "model_index.json", "sd3")), ValueError, "model_index.json"),
    Case("an index of a list", model(lambda w: w.with_bytes(w.pipeline_dir, "model_index.json", "[]")), ValueError, "model_index.json"),
    Case("another pipeline", model(lambda w: w.with_json(w.pipeline_dir, "model_index.json", _class_name="FluxPipeline")), ValueError, "FluxPipeline"),
    Case("no weights", weights_of(lambda w: without(w.pipeline_dir, w, TRANSFORMER)), FileNotFoundError, "diffusion_pytorch_model.safetensors"),
    Case("a T5 that is gone", weights_of(lambda w: without(w.pipeline_dir, w, "text_encoder_3/model.safetensors")), FileNotFoundError, "text_encoder_3/model.safetensors null"),
    Case("a bare null for T5", lambda w: load_pipeline(w.with_json(w.pipeline_dir, "model_index.json", text_encoder_3=None), dtype=torch.float32), ValueError, "model_index.json text_encoder_3 null"),
    Case("a pipeline without a VAE", lambda w: load_pipeline(without(w.pipeline_dir, w, "vae/diffusion_pytorch_model.safetensors"), dtype=torch.float32), ValueError, "vae/diffusion_pytorch_model.safetensors"),
    Case("an index of shards of text", weights_of(lambda w: indexed(w, '{"weight_map": "a"}')), FileNotFoundError, "weight_map index.json"),
    Case("a shard that is gone", weights_of(lambda w: indexed(w, '{"weight_map": {"a": "b.safetensors"}}')), FileNotFoundError, "transformer/b.safetensors"),
    Case("a transformer of no size", model(lambda w: w.with_json(w.pipeline_dir, "transformer/config.json", sample_size=...)), ValueError, "sample_size NoneType"),
    Case("a VAE of no widths", model(lambda w: w.with_json(w.pipeline_dir, "vae/config.json", block_out_channels=3)), ValueError, "block_out_channels 3"),
]  # fmt: skip

LRM_UNET, LRM_TEXT, LRM_HEAD = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "state_dict.pt",
)


def lrm(make: Callable[[World], object], **options):
    """An LRM for SD1.5 loaded from what `make` returns; its base model lies beside it."""
    return lambda w: LrmReward.from_pretrained(make(w), **{"family": "sd15", "local_files_only": True, **options})


def lrm_json(name: str, **changes: object):
    return lrm(lambda w: w.with_json(w.lrm_dir, name, **changes))


def lrm_tensors(name: str, change):
    return lrm(lambda w: w.with_tensors(w.lrm_dir, name, change))


def lrm_head(change):
    """An LRM whose state_dict.pt was modified in place by `change`."""

    def make(world: World) -> Path:
        folder = world.copy(world.lrm_dir)
        head = torch.load(folder / LRM_HEAD, weights_only=True)
        change(head)
        torch.save(head, folder / LRM_HEAD)
        return folder

    return lrm(make)


def one_file_lrm(change):
    """An LRM of one file whose tensors were modified in place by `change`."""

    def call(world: World) -> object:
        path = one_file(world.lrm_dir, world.fresh() / "lrm.pt")
        found = torch.load(path, weights_only=True)
        change(found)
        torch.save(found, path)
        return LrmReward.from_pretrained(path, family="sd15", base=world.lrm_dir)

    return call


def lrm_images(**changes: object):
    """Images for an LRM whose base model has another VAE."""

    def call(world: World) -> object:
        base = world.with_json(world.lrm_dir, "vae/config.json", **changes)
        reward = LrmReward.from_pretrained(world.lrm_dir, family="sd15", base=base)
        return reward.score_images(torch.zeros(1, 3, 64, 64), "a")

    return call


def with_word(world: World) -> Path:
    """An LRM whose tokenizer has a word more than its text encoder."""
    folder = world.copy(world.lrm_dir)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    tokenizer.add_tokens(["green</w>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


LRM = [
    Case("nothing", lrm(lambda w: ""), ValueError, "LRM"),
    Case("a number", lrm(lambda w: 3), TypeError, "LRM int"),
    Case("an empty folder", lrm(lambda w: w.fresh()), FileNotFoundError, "state_dict.pt lrm_sd15 subfolder"),
    Case("a family of its own", lrm(lambda w: w.lrm_dir, family="sd3"), ValueError, "family sd3 sdxl"),
    Case("SDXL's name", lrm(lambda w: w.lrm_dir, family="sdxl"), FileNotFoundError, "text_encoder_2"),
    Case("SDXL's UNet", lrm_json("unet/config.json", addition_embed_type="text_time"), ValueError, "addition_embed_type text_time lrm-sdxl"),
    Case("an inpainting UNet", lrm_json("unet/config.json", in_channels=9), ValueError, "in_channels 9 4"),
    Case("three down blocks", lrm_json("unet/config.json", down_block_types=["DownBlock2D"] * 3), ValueError, "down_block_types 3 4"),
    Case("another class", lrm_json("unet/config.json", _class_name="SD3Transformer2DModel"), ValueError, "_class_name SD3Transformer2DModel"),
    Case("a UNet of no size", lrm_json("unet/config.json", sample_size=...), ValueError, "sample_size NoneType int"),
    Case("widths of text", lrm_json("unet/config.json", block_out_channels="wide"), ValueError, "config"),
    Case("other widths", lrm_json("unet/config.json", block_out_channels=[8, 16, 32, 64]), ValueError, "unet.down_blocks.3.resnets.0.conv1.weight 32 64"),
    Case("no UNet", lrm(lambda w: without(w.lrm_dir, w, LRM_UNET)), FileNotFoundError, "diffusion_pytorch_model.safetensors"),
    Case("a UNet without conv_in", lrm_tensors(LRM_UNET, drop("conv_in.weight")), ValueError, "missing unet.conv_in.weight"),
    Case("a UNet with a LoRA", lrm_tensors(LRM_UNET, lambda t: t.update(lora=torch.zeros(2))), ValueError, "unexpected unet.lora"),
    Case("a UNet cut short", lrm(lambda w: w.with_bytes(w.lrm_dir, LRM_UNET, lambda d: d[:9000])), ValueError, "diffusion_pytorch_model.safetensors"),
    Case("a text encoder without a layer", lrm_tensors(LRM_TEXT, drop("layers.2.mlp.fc1.weight")), ValueError, "missing text_encoder"),
    Case("a wider text encoder", lrm_json("text_encoder/config.json", hidden_size=32), ValueError, "cross_attention_dim 16 32"),
    Case("no text config", lrm(lambda w: without(w.lrm_dir, w, "text_encoder/config.json")), FileNotFoundError, "config.json"),
    Case("a head with code", lrm(lambda w: w.with_bytes(w.lrm_dir, LRM_HEAD, bomb_zip(w))), ValueError, "state_dict.pt"),
    Case("a pickled head", lrm(lambda w: w.with_bytes(w.lrm_dir, LRM_HEAD, bomb_bytes(w))), ValueError, "state_dict.pt"),
    Case("a head of text", lrm(lambda w: w.with_bytes(w.lrm_dir, LRM_HEAD, "logit_scale")), ValueError, "state_dict.pt"),
    Case("no text_projection", lrm_head(lambda t: t.pop("text_projection")), ValueError, "missing text_projection.weight"),
    Case("a bias", lrm_head(lambda t: t["visual_projection"].update(bias=torch.zeros(16))), ValueError, "unexpected visual_projection.bias"),
    Case("a head without stages", lrm_head(lambda t: t["visual_projection"].update(weight=torch.zeros(16, 32))), ValueError, "visual_projection.weight 32 120"),
    Case("a scale of text", lrm_head(lambda t: t.update(logit_scale="2.66")), ValueError, "logit_scale str"),
    Case("a head of numbers", lrm_head(lambda t: t.update({3: 1.0})), ValueError, "state_dict.pt"),
    Case("an integer scale", lrm_head(lambda t: t.update(logit_scale=torch.tensor(3))), ValueError, "logit_scale torch.int64"),
    Case("one file: the head alone", lrm(lambda w: w.lrm_dir / LRM_HEAD), ValueError, "state_dict.pt"),
    Case("one file: no conv_in", one_file_lrm(drop("unet.conv_in.bias")), ValueError, "lrm.pt missing unet.conv_in.bias"),
    Case("one file: a stranger", one_file_lrm(lambda t: t.update(loss=torch.zeros(2))), ValueError, "lrm.pt unexpected loss"),
    Case("no tokenizer", lrm(lambda w: w.lrm_dir, base="nobody-here/nothing-there"), OSError, "nobody-here/nothing-there"),
    Case("a base without tokenizer", lambda w: LrmReward.from_pretrained(w.lrm_dir, family="sd15", base=w.fresh()), ValueError, "tokenizer"),
    Case("a larger tokenizer", lrm(lambda w: with_word(w)), ValueError, "tokenizer tokens text_encoder"),
    Case("a base of blanks", lrm(lambda w: w.lrm_dir, base="  "), ValueError, "base"),
    Case("SDXL's VAE", lrm_images(scaling_factor=0.13025), ValueError, "base 0.13025 0.18215"),
    Case("a VAE that shifts", lrm_images(shift_factor=0.1), ValueError, "base shift_factor 0.1"),
]  # fmt: skip

GROUPS = {
    "reward folders": PLACES,
    "reward configs": CONFIGS,
    "reward weights": TENSORS,
    "released layout": RELEASED,
    "base models": BASES,
    "pixel rewards": PIXEL,
    "LRM": LRM,
    "prompt files": PROMPTS,
    "captioned images": IMAGES,
    "pairs of images (jsonl)": JSONL,
    "pairs of latents": PAIRS,
    "LoRA files": LORA,
    "model folders": MODELS,
}
