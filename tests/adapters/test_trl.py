"""The trainers in TRL's manner: options, reward functions, runs equal to the recipes', callbacks, resumed runs.

Contracts are recorded from huggingface/trl at f2cd577 (1.16, trl/trainer/grpo_trainer.py: how reward functions are
called) and at 0.23.1 (trl/trainer/alignprop_trainer.py and ddpo_trainer.py: the call of a reward, and the loss).
"""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from paths import load_recipe
from peft import LoraConfig
from same_run import differences
from tiny_recipes import PROMPTS, make_world, stand_in
from transformers import HfArgumentParser, PrinterCallback, ProgressCallback, TrainerCallback

from dinalrm_align.adapters import trl
from dinalrm_align.adapters.trl_config import DiffusionDPOConfig, FlowGRPOConfig, ReFLConfig
from dinalrm_align.align.policy import PROJECTIONS
from dinalrm_align.align.setup import run_prompts
from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.reward.registry import load_reward
from dinalrm_align.train.settings import types_by_name

TRAINERS = {
    ReFLConfig: trl.ReFLTrainer,
    FlowGRPOConfig: trl.FlowGRPOTrainer,
    DiffusionDPOConfig: trl.DiffusionDPOTrainer,
}
ROWS = [{"prompt": prompt, "wanted": index / 2} for index, prompt in enumerate(PROMPTS)]
SMALL = dict(
    max_steps=2, save_steps=1, per_device_train_batch_size=1, num_inference_steps=2, eval_samples=2, eval_steps=0,
    gradient_checkpointing=False, ema_decay=0.5, gold_reward="oracle",
    settings=["profile_every=0", "evaluation.shown=1", "watch.sigmas=[]", "watch.drift_sigmas=[]", "device=cpu"],
)  # fmt: skip
OPTIONS = [
    "--loop.steps=2", "--loop.checkpoint_every=1", "--evaluation.samples=2", "--evaluation.every=0", "--device=cpu",
    "--gradient_checkpointing=false", "--loop.ema_decay=0.5", "--gold=oracle", "--profile_every=0",
    "--evaluation.shown=1", "--watch.sigmas=[]", "--watch.drift_sigmas=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl_world")
    make_world(folder)
    return folder


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr("dinalrm_align.align.setup.plot_run", lambda folder: None)
    monkeypatch.setattr("dinalrm_align.align.evaluation.save_grid", stand_in_of_grid)
    monkeypatch.setattr("dinalrm_align.align.evaluation.save_before_after", lambda *images, **options: None)


def stand_in_of_grid(images, captions, path, **options):
    stand_in(images, path)


def brightness(images, prompts, **columns):
    return images.mean(dim=(1, 2, 3))


def latent_mean(latents, prompts):
    return latents.mean(dim=(1, 2, 3))


def grpo(world, folder, *, reward_funcs=brightness, pipeline=None, callbacks=(), rows=ROWS, **options):
    options = SMALL | dict(num_generations=2, output_dir=str(folder), base_model=str(world)) | options
    options["settings"] = [*SMALL["settings"], "grpo.window=all", "grpo.window_range=null"]
    return trl.FlowGRPOTrainer(
        pipeline or str(world), reward_funcs, FlowGRPOConfig(**options), rows, rows, callbacks=callbacks
    )


# options


@pytest.mark.parametrize("config", TRAINERS)
def test_each_option_sets_a_setting_of_the_recipe(config):
    known = types_by_name(TRAINERS[config].run_type)
    args = config(**{entry.name: 1 for entry in dataclasses.fields(config) if entry.name != "settings"})
    values = args.values()
    assert len(values) > 25 and set(values) <= set(known)


@pytest.mark.parametrize("config", TRAINERS)
def test_the_argument_parser_of_transformers_reads_the_command_line(config):
    words = ["--learning_rate", "1e-4", "--max_steps", "7", "--gradient_checkpointing", "true", "--beta", "0.1"]
    words += ["--reward_weights", "1", "0.2", "--report_to", "wandb", "--settings", "policy.rank=4", "optim.eps=1e-6"]
    (args,) = HfArgumentParser(config).parse_args_into_dataclasses(words)
    assert args.reward_weights == [1.0, 0.2] and args.seed is None
    values = args.values()
    beta = {"refl": "refl.kl_weight", "grpo": "grpo.kl_beta", "dpo": "dpo.beta"}[config.METHOD]
    assert values == {
        "optim.lr": 1e-4, "loop.steps": 7, "gradient_checkpointing": True, beta: 0.1, "tracker": "wandb",
        "policy.rank": 4, "optim.eps": 1e-6,
    }  # fmt: skip


def test_the_argument_parser_refuses_a_word_that_is_no_choice(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(ReFLConfig).parse_args_into_dataclasses(["--variant", "draft"])
    assert "draft_lv" in capsys.readouterr().err


def test_the_help_names_the_setting_of_each_option():
    text = HfArgumentParser(FlowGRPOConfig).format_help()
    assert "Peak learning rate of AdamW. [optim.lr]" in " ".join(text.split())


@pytest.mark.extra
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="the extra trl")
def test_trl_parser_reads_yaml_and_command_line(tmp_path):
    from trl import TrlParser

    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"max_steps": 3, "beta": 0.5, "reward_weights": [1, 2]}))
    (args,) = TrlParser(FlowGRPOConfig).parse_args_and_config(
        ["--config", str(tmp_path / "config.yaml"), "--beta", "1"]
    )
    assert args.values() == {"loop.steps": 3, "grpo.kl_beta": 1.0} and args.reward_weights == [1, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(learning_rate=-1.0), "optim.lr: got -1.0"),
        (dict(max_steps="many"), "loop.steps: got str 'many'"),
        (dict(settings=["refl.variat=refl"]), "did you mean 'refl.variant'"),
        (dict(settings=["refl.variant"]), "expected NAME=VALUE"),
        (dict(settings=["resume=runs/a"]), "expected trainer.train(resume_from_checkpoint='runs/a')"),
        (dict(settings=["reward=pixel"]), "multiple values for keyword argument 'reward'"),
        (dict(reward_weights=[1.0, 2.0]), "reward_weights: got 2 for 1"),
    ],
)
def test_invalid_options_raise(world, options, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        trl.ReFLTrainer(str(world), brightness, ReFLConfig(**options))


# the LoRA


def test_a_peft_config_gives_rank_alpha_and_initialisation():
    given = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=PROJECTIONS)
    assert trl.lora_values(given) == {"policy.rank": 4, "policy.alpha": 8.0, "policy.init": "gaussian"}
    assert trl.lora_values(LoraConfig(r=4))["policy.init"] == "kaiming" and trl.lora_values(None) == {}


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(lora_dropout=0.1), "lora_dropout"),
        (dict(target_modules=["to_q"]), "to_q"),
        (dict(use_dora=True), "use_dora"),
        (dict(init_lora_weights="pissa"), "pissa"),
    ],
)
def test_a_peft_config_that_the_policy_cannot_have_is_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        trl.lora_values(LoraConfig(r=4, **changes))


# reward functions


def test_functions_and_names_add_up():
    text, functions = trl.combined(
        ["dinalrm + 0.5*pickscore", brightness, lambda images, prompts: images, brightness],
        [2.0, 1.0, -0.25, 3.0],
        ROWS,
    )
    assert text == (
        "2.0*dinalrm + pickscore + reward_funcs:brightness + -0.25*reward_funcs:_lambda_ + "
        "3.0*reward_funcs:brightness_2"
    )
    assert [*functions] == ["reward_funcs:brightness", "reward_funcs:_lambda_", "reward_funcs:brightness_2"]


@pytest.mark.parametrize("reads", ["images", "latents"])
def test_a_function_gets_each_column_by_keyword_as_trl_passes_them(reads):
    seen = {}

    def on_images(prompts, images, wanted, **kwargs):
        seen.update(kwargs, prompts=prompts, samples=images, wanted=wanted)
        return [0.5, 1.5]

    def on_latents(prompts, latents, wanted, **kwargs):
        return on_images(prompts, latents, wanted, **kwargs)

    rows = [{**row, "source": "a"} for row in ROWS]
    reward = load_reward(
        "module:name", functions={"module:name": trl.with_columns(locals()[f"on_{reads}"], rows)}, vae=None
    )
    samples = torch.zeros(2, 3 if reads == "images" else 16, 8, 8)
    score = reward.score_images if reads == "images" else reward
    assert score(samples, [PROMPTS[2], PROMPTS[0]]).tolist() == [0.5, 1.5]
    assert seen.pop("samples").shape == samples.shape
    embeds = {} if reads == "images" else dict(prompt_embeds=None, pooled_prompt_embeds=None)
    assert seen == {"prompts": [PROMPTS[2], PROMPTS[0]], "wanted": [1.0, 0.0], "source": ["a", "a"], **embeds}


def test_a_function_without_keyword_arguments_gets_what_it_names():
    call = trl.with_columns(lambda images, wanted: images.mean(dim=(1, 2, 3)) + torch.tensor(wanted), ROWS)
    assert call(torch.ones(2, 3, 4, 4), [PROMPTS[1], PROMPTS[0]]).tolist() == [1.5, 1.0]


def test_two_rows_of_one_prompt_must_be_equal():
    trl.with_columns(brightness, [ROWS[0], ROWS[0]])
    with pytest.raises(ValueError, match="two rows that differ"):
        trl.with_columns(brightness, [ROWS[0], {**ROWS[0], "wanted": 9}])


def test_a_column_named_as_the_samples_is_refused():
    call = trl.with_columns(brightness, [{"prompt": "a", "images": 1}])
    with pytest.raises(TypeError, match="images"):
        call(torch.ones(1, 3, 4, 4), ["a"])


@pytest.mark.parametrize("scores", [[None, 1.0], [float("nan"), 1.0], [1.0]], ids=["None", "NaN", "one too few"])
def test_what_is_no_score_for_each_sample_raises(scores):
    function = trl.with_columns(lambda images, prompts: scores, ROWS)
    reward = load_reward("module:name", functions={"module:name": function})
    with pytest.raises((ValueError, TypeError)):
        reward.score_images(torch.zeros(2, 3, 8, 8), PROMPTS[:2])


@pytest.mark.parametrize(
    "rows", [[], [{"text": "a"}], [{"prompt": [{"role": "user", "content": "a"}]}], {"train": [{"prompt": "a"}]}]
)
def test_rows_without_a_text_prompt_are_refused(rows):
    with pytest.raises(ValueError, match="train_dataset"):
        trl.dataset_rows(rows, "train_dataset")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_data_set_may_be_the_name_of_a_file(kind, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    rows = trl.dataset_rows(kind(tmp_path / "prompts.txt"), "train_dataset")
    assert rows == [{"prompt": "a red circle"}, {"prompt": "a blue square"}]


# runs


@pytest.mark.parametrize(
    ("rows", "options", "samples"),
    [(3, {}, 3), (1, {}, 2), (3, dict(eval_samples=2), 2), (3, dict(settings=["evaluation.samples=4"]), 4)],
)
def test_every_held_out_row_is_evaluated_once_by_default(rows, options, samples, world, tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "prepare", lambda resolved, **options: _Unprepared(resolved))
    args = FlowGRPOConfig(**(dict(gold_reward="oracle", output_dir=str(tmp_path)) | options))
    trainer = trl.FlowGRPOTrainer(str(world), brightness, args, ROWS, ROWS[:rows])
    prompts = [row["prompt"] for row in ROWS[:rows]]
    wanted = [prompts[index % rows] for index in range(samples)]
    assert run_prompts(trainer.setup.resolved)[1] == wanted


class _Unprepared:
    """What a trainer reads of `Setup`, without models."""

    def __init__(self, resolved):
        self.resolved, self.accelerator = resolved, SimpleNamespace(is_main_process=True, is_local_main_process=True)


class Recorder(TrainerCallback):
    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert model.peft_config and state.max_steps and state.is_world_process_zero
        self.events.append(("begin", state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step", state.global_step))
        control.should_training_stop = state.global_step == self.stop_at
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert state.log_history[-1]["loss"] == logs["loss"]
        self.events.append(("log", state.global_step))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(("evaluate", state.global_step, "eval_gold" in metrics))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step, args.output_dir))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("end", state.global_step))


@pytest.mark.parametrize("mode", ["refl", "grpo", "dpo online", "dpo offline"])
def test_a_trainer_makes_the_run_of_the_recipe(mode, world, tmp_path):
    window = ["grpo.window=all", "grpo.window_range=null"]
    config, own, words = {
        "refl": (ReFLConfig, {}, ["--refl.batch_size=1"]),
        "grpo": (FlowGRPOConfig, dict(num_generations=2), ["--grpo.groups=1", "--grpo.group_size=2"]),
        "dpo online": (DiffusionDPOConfig, dict(num_generations=2), ["--dpo.batch_size=1", "--dpo.group_size=2"]),
        "dpo offline": (
            DiffusionDPOConfig,
            dict(pairs=str(world / "pairs")),
            ["--dpo.batch_size=1", "--dpo.mode=offline", f"--pairs={world}/pairs"],
        ),
    }[mode]
    settings = [*SMALL["settings"], *(window if mode == "grpo" else [])]
    args = config(**(SMALL | own | dict(settings=settings, output_dir=str(tmp_path / "a"))))
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    lora = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian")
    TRAINERS[config](str(world), "dinalrm", args, rows, rows, peft_config=lora).train()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words += [f"--{word}" for word in window if mode == "grpo"]
    load_recipe(f"{config.METHOD}_sd35").main(
        [f"--model={world}", f"--output_dir={tmp_path / 'b'}", f"--prompts={tmp_path / 'prompts.txt'}",
         f"--eval_prompts={tmp_path / 'prompts.txt'}", f"--{config.METHOD}.num_steps=2", "--policy.rank=2",
         "--policy.alpha=2", *words, *OPTIONS]
    )  # fmt: skip
    assert differences(tmp_path / "a", tmp_path / "b") == ["config.yaml: differs"]


def test_callbacks_resume_evaluation_and_export(world, tmp_path):
    first, second, whole = Recorder(stop_at=1), Recorder(), Recorder()
    for folder, callbacks in (("whole", [whole, ProgressCallback(), PrinterCallback()]), ("parts", [first])):
        trainer = grpo(world, tmp_path / folder, callbacks=callbacks)
        output = trainer.train()
    parts = str(tmp_path / "parts")
    assert output.global_step == 1 and trainer.control.should_training_stop
    assert first.events == [("begin", 0), ("step", 1), ("log", 1), ("save", 1, parts), ("end", 1)]
    with pytest.raises(ValueError, match="holds a run"):
        grpo(world, tmp_path / "parts").train()
    trainer = grpo(world, tmp_path / "parts", callbacks=[second])
    output = trainer.train(resume_from_checkpoint=True)
    assert second.events[:3] == [("begin", 1), ("step", 2), ("log", 2)] and output.global_step == 2
    assert whole.events[-3:] == [("evaluate", 2, True), ("save", 2, str(tmp_path / "whole")), ("end", 2)]
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["gold"]
    names = ["metrics.jsonl", "lora/pytorch_lora_weights.safetensors", "summary.json", "evaluations/000002.json"]
    assert not {f"{name}: differs" for name in names} & {*differences(tmp_path / "whole", tmp_path / "parts")}
    assert trainer.evaluate()["eval_gold"] == output.metrics["gold"]
    trainer.save_model(tmp_path / "saved")
    assert not differences(tmp_path / "saved", tmp_path / "parts" / "lora")


def test_a_resumed_run_must_have_its_settings(world, tmp_path):
    grpo(world, tmp_path / "run", max_steps=1).train()
    with pytest.raises(ValueError, match="seed: got 1; expected 0"):
        grpo(world, tmp_path / "run", seed=1).train(resume_from_checkpoint=True)


def test_a_pipeline_object_keeps_its_text_encoders_and_samples_from_the_trained_model(world, tmp_path):
    pipeline = load_pipeline(world / "pipeline", dtype=torch.float32)
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    sample = dict(num_inference_steps=2, latents=latents, output_type="latent", height=64, width=64)
    before = pipeline(PROMPTS[0], **sample).images
    trainer = grpo(world, tmp_path / "run", pipeline=pipeline, max_steps=1, reward_funcs=latent_mean, learning_rate=0.1)
    trainer.train()
    assert (pipeline(PROMPTS[0], **sample).images - before).abs().max() > 0
    with trainer.setup.policy.reference():
        assert torch.equal(pipeline(PROMPTS[0], **sample).images, before)


def test_a_failing_reward_function_stops_the_run(world, tmp_path):
    def broken(images, prompts):
        raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer"):
        grpo(world, tmp_path / "run", reward_funcs=broken).train()


def test_refl_refuses_a_function_without_a_gradient(world, tmp_path):
    args = ReFLConfig(**SMALL, output_dir=str(tmp_path / "run"))
    trainer = trl.ReFLTrainer(
        str(world), lambda images, prompts: brightness(images, prompts).tolist(), args, ROWS, ROWS
    )
    with pytest.raises(ValueError, match="not differentiable"):
        trainer.train()


def test_a_reward_object_brings_its_text_length(world, tmp_path):
    reward = load_reward(f"dinalrm={world / 'dinalrm'}", pipeline=str(world / "pipeline"))
    trainer = grpo(world, tmp_path / "run", reward_funcs=[reward, latent_mean], reward_weights=[1.0, 0.5])
    assert trainer.setup.reward.weights == {"reward_funcs:LatentReward": 1.0, "reward_funcs:latent_mean": 0.5}
    assert trainer.setup.resolved.given.text_lengths == {16}


def test_push_to_hub_uploads_the_lora_with_a_card(world, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, repo_id, exist_ok, private):
            calls.append((repo_id, exist_ok, private))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    trainer = grpo(world, tmp_path / "run")
    with pytest.raises(ValueError, match="hub_model_id"):
        trainer.push_to_hub()
    assert trainer.push_to_hub("me/lora", private=True) == "address"
    assert calls[1:] == [
        ("me/lora", True, True), ("me/lora", ["README.md", "config.yaml", "pytorch_lora_weights.safetensors"])
    ]  # fmt: skip


# rewards of trl 0.23.1


class AlignProp:
    """alignprop_trainer.py of trl 0.23.1: how it calls the reward, and its loss. Prompts and metadata are tuples."""

    def __init__(self, reward_function):
        self.reward_fn = reward_function

    def loss(self, images, prompts):
        pairs = {"images": images, "prompts": tuple(prompts), "prompt_metadata": tuple({} for _ in prompts)}
        reward, reward_metadata = self.reward_fn(pairs["images"], pairs["prompts"], pairs["prompt_metadata"])
        return 10.0 - (reward).mean()


@pytest.mark.parametrize("latents", [True, False])
def test_align_prop_gets_a_gradient_and_the_score_of_a_direct_call(latents, world):
    reward = load_reward(
        f"dinalrm={world / 'dinalrm'}", pipeline=load_pipeline(world / "pipeline", dtype=torch.float32)
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *((16, 8, 8) if latents else (3, 64, 64)), generator=generator).requires_grad_()
    loss = AlignProp(trl.reward_function(reward, latents=latents)).loss(images, PROMPTS[:2])
    loss.backward()
    direct = (reward if latents else reward.score_images)(images.detach(), PROMPTS[:2])
    assert abs(10 - loss.item() - direct.mean().item()) < 1e-5 and images.grad.abs().max() > 0


def test_a_reward_of_trl_by_name_is_shared_and_may_have_no_gradient(world):
    place = dict(pipeline=str(world / "pipeline"))
    name = f"dinalrm={world / 'dinalrm'}"
    one, other = trl.reward_function(name, **place), trl.reward_function(name, latents=True, **place)
    assert one.__closure__[1].cell_contents is other.__closure__[1].cell_contents
    oracle = trl.reward_function("oracle")
    scores, metadata = oracle(torch.zeros(1, 3, 64, 64), (PROMPTS[0],), ({},))
    assert scores.shape == (1,) and metadata == {} and not scores.requires_grad
