"""What a command needs is found before anything is loaded; one folder of weights supplies a model with its rewards."""

import shutil
import time

import huggingface_hub
import pytest
import torch
from paths import RECIPES, load_recipe
from safetensors.torch import save_file
from tiny_clip import save_clip, write_processor

from dinalrm_align.align import setup
from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.resolve import resolve
from dinalrm_align.models import specs
from dinalrm_align.models.specs import MODELS, resolve_model
from dinalrm_align.reward import needs
from dinalrm_align.reward.names import REWARDS, parse_reward, reward_sources, source_of
from dinalrm_align.reward.needs import check_sources
from dinalrm_align.reward.pixel.hpsv2 import HPSv2Reward
from dinalrm_align.reward.registry import load_reward
from dinalrm_align.shapes.stack import StackConfig, build_pipeline

SD35 = MODELS["sd35"]


@pytest.fixture(scope="module")
def full_pipeline(tmp_path_factory):
    """A pipeline that is SD3.5's by its vocabulary, and tiny otherwise."""
    pipeline = build_pipeline(StackConfig.tiny(), seed=0)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.resize_token_embeddings(49_408)
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("full") / "pipeline")
    return folder


@pytest.fixture
def weights(tmp_path, full_pipeline, official):
    """One folder of weights, as at full size: a pipeline, the released reward, PickScore with its processor apart."""
    (tmp_path / "pipeline").symlink_to(full_pipeline)
    (tmp_path / "dinalrm").symlink_to(official)
    save_clip(tmp_path / "pixel")
    (tmp_path / "pixel" / "preprocessor_config.json").unlink()
    write_processor(tmp_path / "clip_h")
    return tmp_path


def refusal(call, *arguments, **options):
    with pytest.raises(FileNotFoundError) as error:
        call(*arguments, **options)
    return str(error.value)


# --------------------------------------------------------------------------------------------- one folder of weights


@pytest.mark.parametrize("name", ["", "pipeline"])
def test_rewards_beside_a_pipeline_are_found(weights, name):
    """It is no embedded world, although its folders have the names of one: full-size guidance, PickScore as gold."""
    spec, reason = resolve_model(str(weights / name))
    found = (spec.kind, spec.gold, spec.guidance_scale, spec.pipeline, spec.reward, spec.pixel, spec.pixel_processor)
    folders = [str(weights / part) for part in ("pipeline", "dinalrm", "pixel", "clip_h")]
    assert found == ("sd35", "pixel", 4.5, *folders)
    assert str(weights / "dinalrm") in reason and str(weights / "pixel") in reason
    check_sources(spec, {"reward": "dinalrm + 0.2*pickscore", "gold": spec.gold})
    pickscore, pixel = (load_reward(name, spec=spec) for name in ("pickscore", "pixel"))
    assert pickscore.fingerprint() == pixel.fingerprint()
    assert reward_sources("pickscore", spec) == reward_sources("pixel", spec)


def test_repositories_are_found_under_their_own_names(weights):
    (weights / "pipeline").rename(weights / "stable-diffusion-3.5-medium")
    (weights / "pixel").rename(weights / "PickScore_v1")
    (weights / "HPSv2").mkdir()
    spec, _ = resolve_model(str(weights))
    assert (spec.pipeline, spec.pixel) == (str(weights / "stable-diffusion-3.5-medium"), str(weights / "PickScore_v1"))
    sources = {name: source_of(*parse_reward(name), spec) for name in ("hpsv2", "clipscore", "mps", "mps=x.pth")}
    hub = REWARDS["clipscore"].source
    assert sources == {"hpsv2": str(weights / "HPSv2"), "clipscore": hub, "mps": None, "mps=x.pth": "x.pth"}


def test_the_vocabulary_tells_an_embedded_world(tiny_world, full_pipeline, tmp_path):
    for folder in (tiny_world, tiny_world / "pipeline", specs.SHAPES_WEIGHTS):
        spec, _ = resolve_model(str(folder))
        assert (spec.kind, spec.gold, spec.guidance_scale) == ("shapes", MODELS["shapes"].gold, 3.0)
    (tmp_path / "pipeline").symlink_to(full_pipeline)
    spec, _ = resolve_model(str(tmp_path))
    assert (spec.kind, spec.reward, spec.pixel) == ("sd35", SD35.reward, SD35.pixel)  # nothing else is there: the hub


# --------------------------------------------------------------------------------------------------- what is missing


def test_a_run_names_all_that_is_missing_before_it_loads_anything(weights, monkeypatch):
    """The last of these was found after 513 s and 19.5 GB."""
    (weights / "pixel" / "model.safetensors").unlink()
    (weights / "dinalrm").unlink()
    shutil.copytree(specs.PACKAGE.parent / "tests/fixtures/official_tiny", weights / "dinalrm")
    (weights / "dinalrm" / "checkpoint" / "rm_head.pt").unlink()
    for name in ("load_pipeline", "load_gold", "load_reward", "read_lora"):
        monkeypatch.setattr(setup, name, lambda *_, **options: pytest.fail("loaded something"))
    words = [f"--model={weights}", "--anchor.reward=hpsv2", "--gold=[pixel, clipscore=/no/clip]", "--device=cpu"]
    words += [f"--output_dir={weights / 'run'}", "--policy.init_from=/no/lora"]
    resolved = resolve(ReflRun, "", RECIPES / "refl_sd35.py", words, gradient=True)
    text = refusal(setup.prepare, resolved)
    for part in (
        "LoRA /no/lora", "--policy.init_from DIR", f"latent reward {weights / 'dinalrm'} (lacks checkpoint/rm_head.pt)",
        "--reward dinalrm=DIR", "reward hpsv2 xswu/HPSv2: --anchor.reward hpsv2=DIR", "HF_HUB_OFFLINE is set",
        f"reward pickscore {weights / 'pixel'} (lacks model.safetensors): --gold pickscore=DIR",
        "reward clipscore /no/clip", "--gold clipscore=DIR", "--model DIR",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(("reward", "why"), [("no_such_module:score", "no module"), ("oracle", "embedded world only")])
def test_a_reward_that_is_code_is_found_before_anything_is_loaded(weights, monkeypatch, reward, why):
    for name in ("load_pipeline", "load_gold", "load_reward"):
        monkeypatch.setattr(setup, name, lambda *_, **options: pytest.fail("loaded something"))
    words = [f"--model={weights}", f"--reward={reward}", "--device=cpu", f"--output_dir={weights / 'run'}"]
    with pytest.raises((ImportError, ValueError), match=why):
        setup.prepare(resolve(GrpoRun, "", RECIPES / "grpo_sd35.py", words))


def test_files_of_the_pipeline_are_named_with_those_of_rewards(weights, full_pipeline):
    """Only a damaged pipeline was named, and the rewards in the next attempt."""
    (weights / "pipeline").unlink()
    shutil.copytree(full_pipeline, weights / "pipeline")
    (weights / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (weights / "pixel" / "model.safetensors").unlink()
    spec, _ = resolve_model(str(weights))
    text = refusal(check_sources, spec, {"reward": "dinalrm", "gold": "pixel"})
    assert "(lacks transformer/diffusion_pytorch_model.safetensors): --model DIR" in text
    assert "(lacks model.safetensors): --gold pickscore=DIR" in text


def test_weights_of_a_variant_are_not_missing_and_load(weights):
    (weights / "pixel" / "model.safetensors").rename(weights / "pixel" / "model.fp16.safetensors")
    spec, _ = resolve_model(str(weights))
    check_sources(spec, {"gold": "pixel"})
    assert load_reward("pixel", spec=spec).clip.dtype == torch.float32


def test_a_damaged_config_is_named_with_all_that_is_missing(weights):
    (weights / "dinalrm").unlink()
    (weights / "dinalrm").mkdir()
    (weights / "dinalrm" / "config.json").write_text('{"model": ')
    (weights / "pixel" / "model.safetensors").unlink()
    spec, _ = resolve_model(str(weights))
    text = refusal(check_sources, spec, {"reward": "dinalrm + clipscore=/no/clip", "gold": "pixel"})
    for part in (
        f"{weights / 'dinalrm'} ({weights / 'dinalrm' / 'config.json'}: not valid JSON", "lacks model.safetensors",
        "/no/clip (it does not exist)",
    ):  # fmt: skip
        assert part in text, part


def test_a_broken_link_beside_the_pipeline_is_missing(weights):
    """The hub would have replaced it without a word."""
    (weights / "dinalrm").unlink()
    (weights / "dinalrm").symlink_to(weights / "gone")
    spec, _ = resolve_model(str(weights))
    assert f"{weights / 'dinalrm'} (it does not exist)" in refusal(check_sources, spec, {"reward": "dinalrm"})


def test_what_a_run_does_not_read_is_not_missing(weights, monkeypatch, tmp_path, official):
    """Encoded pairs need no encoders, and the folder of a reward may have any name."""
    mine, train = load_recipe("mine_pairs"), load_recipe("train_reward")
    (tmp_path / "lr=1e-4").symlink_to(official)
    reached = []
    monkeypatch.setattr(mine, "mine", lambda *arguments: reached.append("mine"))
    mine.main([f"--model={weights}", f"--reward={tmp_path / 'lr=1e-4'}"])
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "index.json").write_text("{}")
    monkeypatch.setattr(train, "train", lambda *arguments: reached.append("train"))
    monkeypatch.setattr(needs, "cached_folder", {SD35.pipeline: tmp_path / "cached"}.get)
    shutil.copytree(weights / "pipeline", tmp_path / "cached")
    for part in ("vae", "text_encoder"):
        shutil.rmtree(tmp_path / "cached" / part)
    train.main(["--model=sd35", f"--pairs={tmp_path / 'pairs'}", f"--output_dir={tmp_path / 'run'}"])
    assert reached == ["mine", "train"]


COMMANDS = {
    "mine_pairs": [], "train_reward": ["--pairs=/no/pairs"], "evaluate_reward": ["--test_sets={own: /no/set}"],
    "prepare_pairs": ["--source=pairs.jsonl"], "score_images": ["a cat", "cat.png"],
    "ablate_reward": ["--pairs=/no/pairs", "--test_sets={own: /no/set}"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_looks_first(name, tmp_path, monkeypatch, capsys):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        load_recipe(name).main(["--model=sd35", *COMMANDS[name]])
    error = capsys.readouterr().err
    assert f"base model {SD35.pipeline}: --model DIR" in error
    assert (SD35.reward in error) == (name in ("mine_pairs", "evaluate_reward", "score_images"))


FILES = {
    "hpsv2": ["HPS_v2_compressed.pt"], "hpsv2.1": ["HPS_v2.1_compressed.pt"],
    "hpsv3": ["HPSv3.safetensors", "config.json", "data_collator_qwen.py"],
    "hpsv3pp": ["hpsv3++.pth", "tokenizer_config.json", "config.json", "data_collator_qwen.py"],
    "imagereward": ["ImageReward.pt", "med_config.json"], "mps": ["MPS_overall_checkpoint.pth"],
    "clipscore": ["config.json", "model.safetensors"], "lrm-sd15": ["state_dict.pt", "tokenizer/tokenizer_config.json"],
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_each_missing_file_of_a_reward_is_named(name, tmp_path, tiny_world):
    """`vae/config.json`: LRM encodes images with its base model's VAE."""
    files = [*FILES[name], "preprocessor_config.json", "tokenizer.json", "vae/config.json"]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    spec, _ = resolve_model(str(tiny_world))
    check_sources(spec, {"reward": f"0.5*{name}={tmp_path}"})
    for file in FILES[name]:
        (tmp_path / file).unlink()
        text = refusal(check_sources, spec, {"reward": f"{name}={tmp_path}"})
        assert f"--reward {name}=DIR" in text or "--hpsv3." in text
        assert file in text or "Qwen" in text or "stable-diffusion" in text  # a base model elsewhere
        (tmp_path / file).write_text("{}")


def test_processors_are_those_beside_the_weights_or_in_the_folder_of_weights(weights, monkeypatch):
    asked = []
    monkeypatch.setattr(HPSv2Reward, "from_pretrained", lambda source, **options: asked.append(options) or 1 / 0)
    spec, _ = resolve_model(str(weights))
    for folder in ("clip_h", "other"):
        (weights / folder).mkdir(exist_ok=True)
        with pytest.raises(ZeroDivisionError):
            load_reward(f"hpsv2={weights / folder}", spec=spec)
    assert [options["processor"] for options in asked] == [str(weights / "clip_h")] * 2


# ----------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A hub client that may ask; the repositories in the returned dict are in its cache."""
    cached = {}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(needs, "cached_folder", cached.get)
    return cached


def test_a_hub_that_does_not_answer_costs_three_seconds_at_most(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda repository: time.sleep(30))
    monkeypatch.setattr(specs.hub_refusals, "__kwdefaults__", {"seconds": 0.2})
    start = time.monotonic()
    text = refusal(check_sources, SD35, {"reward": "dinalrm", "gold": "pixel"})
    assert time.monotonic() - start < 2
    assert text.count("The hub did not answer within 0.2 s") == 1
    for part in (SD35.pipeline, SD35.reward, SD35.pixel, SD35.pixel_processor):
        assert part in text


def test_only_what_is_not_granted_is_missing(online, monkeypatch):
    def refuse_one(repository):
        if repository == SD35.reward:
            raise PermissionError("gated")

    monkeypatch.setattr(huggingface_hub, "auth_check", refuse_one)
    text = refusal(check_sources, SD35, {"reward": "dinalrm", "gold": "pixel"})
    assert f"1. latent reward {SD35.reward}: --reward dinalrm=DIR" in text and "2." not in text and "gated" in text


def test_the_cache_is_used_without_the_hub_if_it_does_not_answer(online, monkeypatch, tmp_path):
    """The client would ask for each file, and wait for each."""
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    online[SD35.reward] = tmp_path
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda repository: None)
    check_sources(SD35, {"reward": "dinalrm"}, parts=None)
    assert not huggingface_hub.is_offline_mode()
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda repository: 1 / 0)
    check_sources(SD35, {"reward": "dinalrm"}, parts=None)
    assert huggingface_hub.is_offline_mode()
