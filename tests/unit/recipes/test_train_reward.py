"""recipes/train_reward.py on the tiny stack: it learns, stops and resumes exactly, and writes what it promises."""

import importlib.util
import json

import pytest
import torch
import yaml
from paths import RECIPES, load_recipe
from PIL import Image
from safetensors.torch import load_file
from tiny_recipes import QUICK_PAIRS

from dinalrm_align.data import source
from dinalrm_align.data.latent_pairs import LatentPairsWriter
from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.reward.config import AccuracyConfig, TrainRewardRun
from dinalrm_align.shapes.stack import StackConfig, build_pipeline
from dinalrm_align.train.command import parse

PROMPTS = ["a small red circle on white", "a large blue square on gray", "two small green crosses on black"]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("train_reward")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world folder of the tiny stack, random weights."""
    folder = tmp_path_factory.mktemp("world")
    build_pipeline(StackConfig.tiny(), seed=0).save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def pairs(world, tmp_path_factory):
    """Latent pairs in which the chosen image has the larger mean: what a head can learn in a few updates."""
    folder = tmp_path_factory.mktemp("pairs") / "latents"
    encoder = PromptEncoder(str(world / "pipeline"), text_length=16)
    embeds, pooled = encoder(PROMPTS)
    generator = torch.Generator().manual_seed(0)
    with LatentPairsWriter(folder, PairManifest(1.0, 0.0, 16)) as writer:
        for group in range(24):
            row = group % len(PROMPTS)
            shift = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
            writer.add(
                PROMPTS[row],
                shift + 0.3 * torch.randn(2, 16, 8, 8, generator=generator),
                prompt_embeds=embeds[row],
                pooled_prompt_embeds=pooled[row],
                concepts=["brightness"],
            )
    return folder


@pytest.fixture
def arguments(world, pairs, tmp_path):
    """A short run on the tiny stack."""
    return [
        f"--model={world}",
        f"--pairs={pairs}",
        "--device=cpu",
        "--batch_size=4",
        "--held_out_prompts=1",
        "--reward.num_layers=2",
        "--reward.visual_taps=[1,2]",
        "--reward.text_taps=[1,2]",
        "--reward.lora.rank=2",
        "--reward.head.width=16",
        "--reward.head.num_attn_heads=2",
        "--optim.warmup_steps=0",
        "--optim.schedule=constant",
        "--loop.ema_decay=0.5",
        "--loop.checkpoint_every=2",
        "--accuracy.sigmas=[0.2,0.5]",
        "--accuracy.ensemble=[0.2,0.5]",
    ]


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_writes_what_it_promises(recipe, arguments, tmp_path):
    run = tmp_path / "run"
    recipe.main([*arguments, f"--output_dir={run}", "--loop.steps=40", "--loop.checkpoint_every=0"])
    metrics = rows(run)
    assert metrics[-1]["step"] == 40
    assert metrics[-1]["accuracy/0.2"] > 0.9
    assert sum(row["loss"] for row in metrics[-5:]) < 0.5 * sum(row["loss"] for row in metrics[1:6])
    report = json.loads((run / "accuracy.json").read_text())
    assert [level["sigma"] for level in report["levels"]] == [[0.2], [0.5], [0.2, 0.5]]
    assert report["levels"][0]["concepts"]["brightness"]["pairs"] == 8
    assert "| brightness | 8 |" in (run / "per_concept.md").read_text()
    assert (run / "accuracy_vs_sigma.png").stat().st_size > 1000
    from dinalrm_align import LatentReward

    reward = LatentReward.from_pretrained(run / "reward")
    generator = torch.Generator().manual_seed(1)
    latents = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) + 0.3 * torch.randn(2, 16, 8, 8, generator=generator)
    bright, dark = reward(latents, prompts=PROMPTS[:1] * 2, sigma=0.2, generator=generator)
    assert bright > dark


def test_a_resumed_run_equals_an_uninterrupted_one(recipe, arguments, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe.main([*arguments, f"--output_dir={whole}", "--loop.steps=4", "--loop.accumulate=2"])
    recipe.main([*arguments, f"--output_dir={parts}", "--loop.steps=2", "--loop.accumulate=2"])
    before = yaml.safe_load((parts / "config.yaml").read_text())
    recipe.main([f"--resume={parts}", "--loop.steps=4"])
    after = yaml.safe_load((parts / "config.yaml").read_text())
    assert after["loop"].pop("steps") == 4 and before["loop"].pop("steps") == 2
    assert after == before and after["resume"] is None
    one, other = load_file(whole / "reward" / "model.safetensors"), load_file(parts / "reward" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["step"] for row in rows(parts)] == [row["step"] for row in rows(whole)]


def test_a_run_is_neither_overwritten_nor_moved(recipe, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    recipe.main([*arguments, f"--output_dir={run}", "--loop.steps=1"])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def refusal(*options):
        with pytest.raises(SystemExit) as ended:
            recipe.main(options)
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert f"{run} holds a run: go on with --resume" in refusal(*arguments, f"--output_dir={run}", "--loop.steps=2")
    elsewhere = tmp_path / "elsewhere"
    said = refusal(f"--resume={run}", f"--output_dir={elsewhere}")
    assert f"output_dir: got {elsewhere}; expected {run}" in said and not elsewhere.exists()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "config.yaml").unlink()
    assert f"no settings file {run / 'config.yaml'}" in refusal(f"--resume={run}")


def test_settings_that_do_not_fit_leave_no_run(recipe, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        recipe.main([*arguments, "--reward.num_layers=9", f"--output_dir={run}"])
    assert ended.value.code == 2 and "num_layers: got 9" in capsys.readouterr().err
    assert not run.exists()


def test_a_gpu_that_is_not_there_is_refused(recipe, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        recipe.main([*arguments, "--device=cuda", f"--output_dir={tmp_path / 'run'}"])
    assert ended.value.code == 2 and "torch finds no CUDA GPU" in capsys.readouterr().err


def test_each_level_is_measured_once():
    config = AccuracyConfig(sigmas=[0.2, 0.5, 0.2, 0], ensemble=[0.5])
    assert config.levels() == [(0.2,), (0.5,), (0,)]


def test_what_is_saved_is_the_average(recipe, arguments, tmp_path):
    run = tmp_path / "run"
    recipe.main([*arguments, f"--output_dir={run}", "--loop.steps=2"])
    exported = load_file(run / "reward" / "model.safetensors")
    average = load_file(run / "checkpoints" / "step_000002" / "ema.safetensors")
    last = load_file(run / "checkpoints" / "step_000002" / "weights.safetensors")
    assert torch.equal(exported["head.query_tokens"], average["head.query_tokens"])
    assert not torch.equal(exported["head.query_tokens"], last["head.query_tokens"])


def test_images_are_encoded_on_the_fly(recipe, arguments, tmp_path, monkeypatch):
    lines = []
    for index, prompt in enumerate(PROMPTS):
        for name, value in (("light", 230), ("dark", 20)):
            Image.new("RGB", (64, 64), (value, value, value + index)).save(tmp_path / f"{name}{index}.png")
        lines.append({"prompt": prompt, "chosen": f"light{index}.png", "rejected": f"dark{index}.png"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = tmp_path / "run"
    options = [f"--pairs={tmp_path / 'pairs.jsonl'}", f"--validation_pairs={tmp_path / 'pairs.jsonl'}"]
    loaded = []
    for name in ("load_vae", "PromptEncoder"):
        original = getattr(source, name)
        count = lambda *args, name=name, original=original, **kwargs: loaded.append(name) or original(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(source, name, count)
    recipe.main([*arguments, *options, "--batch_size=2", "--loop.steps=1", f"--output_dir={run}"])
    assert rows(run)[-1]["step"] == 1 and (run / "reward" / "config.json").exists()
    assert sorted(loaded) == ["PromptEncoder", "load_vae"], "training and validation share them"
    assert json.loads((run / "accuracy.json").read_text())["levels"][0]["pairs"] == 3


def test_validation_pairs_are_evaluated_and_all_pairs_trained_on(recipe, arguments, pairs, tmp_path):
    run = tmp_path / "run"
    recipe.main([*arguments, f"--validation_pairs={pairs}", "--loop.steps=1", f"--output_dir={run}"])
    assert json.loads((run / "accuracy.json").read_text())["levels"][0]["pairs"] == 24


def test_the_embedded_world_makes_its_own_pairs(recipe, arguments, tmp_path):
    run = tmp_path / "run"
    made = ["--shapes_pairs.groups=6", *QUICK_PAIRS, "--shapes_pairs.per_concept=1"]
    arguments = [argument for argument in arguments if not argument.startswith("--pairs")]
    recipe.main([*arguments, *made, "--loop.steps=1", f"--output_dir={run}"])
    concepts = json.loads((run / "accuracy.json").read_text())["levels"][0]["concepts"]
    assert {"shape", "colour", "size", "blur"} <= concepts.keys()
    assert all(concept["pairs"] == 1 for concept in concepts.values())


def test_training_continues_from_a_reward_on_other_pairs(recipe, arguments, tmp_path, capsys):
    """A learning rate near 0 leaves the weights of `--init_from`. One of another shape is refused."""
    made = [
        "--shapes_pairs.groups=6", "--shapes_pairs.per_concept=1", "--loop.steps=1", "--loop.ema_decay=0",
        "--shapes_pairs.raters=5", *QUICK_PAIRS,
    ]  # fmt: skip
    arguments = [argument for argument in arguments if not argument.startswith("--pairs")] + made
    recipe.main([*arguments, f"--output_dir={tmp_path / 'first'}"])
    start = f"--init_from={tmp_path / 'first' / 'reward'}"
    recipe.main(
        [*arguments, start, "--seed=1", "--optim.lr=1e-9", "--lora_lr=1e-9", f"--output_dir={tmp_path / 'second'}"]
    )
    first, second = (load_file(tmp_path / name / "reward" / "model.safetensors") for name in ("first", "second"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)
    with pytest.raises(SystemExit):
        recipe.main([*arguments, start, "--reward.lora.rank=3", f"--output_dir={tmp_path / 'third'}"])
    assert "do not fit the model" in capsys.readouterr().err


def test_pairs_that_do_not_fit_the_reward_are_refused(recipe, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        recipe.main([*arguments, "--reward.text_length=20", f"--output_dir={tmp_path / 'run'}"])
    assert ended.value.code == 2
    assert "text_length 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model=sd35"], "pairs: got none, and sd35 has none"),
        (["--model=sd36"], "did you mean 'sd35'"),
        (["--resume=/no/such/run"], "nothing to resume"),
        (["--batch_size=0"], "batch_size: got 0"),
        (["--reward.tuning=full"], "reward.tuning: got full"),
        (["--loop.stepz=3"], "stepz"),
    ],
)
def test_bad_options_end_with_a_sentence(recipe, options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        recipe.main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_tracker_names_the_extra(recipe, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        recipe.main(["--tracker=wandb"])
    assert "pip install 'dinalrm-align[wandb]'" in capsys.readouterr().err


def test_the_reward_is_uploaded_after_training(recipe, arguments, tmp_path, monkeypatch):
    asked, pushed = [], []
    monkeypatch.setattr("dinalrm_align.train.hub.check_login", asked.append)
    monkeypatch.setattr(
        "dinalrm_align.align.publish.push_run", lambda run, to: pushed.append((sorted(run.iterdir()), to))
    )
    recipe.main([*arguments, "--loop.steps=1", "--push_to_hub=me/reward", f"--output_dir={tmp_path / 'run'}"])
    ((files, to),) = pushed
    assert (asked, to) == (["me/reward"], "me/reward") and "reward" in [path.name for path in files]


def test_the_yaml_of_each_kind_is_read_when_its_model_is_named(recipe):
    shapes, _, spec, *_ = recipe.resolve([])
    assert spec.kind == "shapes" and shapes.reward.num_layers == 4 and shapes.reward.text_length == 16
    sd35, _, spec, *_ = recipe.resolve(["--model=sd35", "--pairs=somewhere", "--optim.lr=1e-4"])
    assert spec.kind == "sd35" and sd35.reward.visual_taps == (4, 8, 12) and sd35.reward.lora.rank == 64
    assert sd35.optim.lr == 1e-4 and sd35.loop.ema_decay == 0.995
    plain, *_ = recipe.resolve(["--config", str(RECIPES / "train_reward_shapes.yaml"), "--model=sd35", "--pairs=x"])
    assert plain.reward.num_layers == 4


@pytest.mark.parametrize("kind", ["shapes", "sd35"])
def test_a_dumped_config_reads_back(kind, tmp_path):
    config, text = parse(TrainRewardRun, "", [], defaults=[RECIPES / f"train_reward_{kind}.yaml"])
    (tmp_path / "config.yaml").write_text(text)
    again, _ = parse(TrainRewardRun, "", ["--config", str(tmp_path / "config.yaml")])
    assert again == config
