"""Invalid command lines of the recipes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from malformed import Command, World, recipe
from paths import RECIPES
from safetensors.torch import save_file

from dinalrm_align.train.checkpoints import save_checkpoint
from dinalrm_align.train.metrics import MetricsLog
from dinalrm_align.train.state import RunState

REFL, TRAIN, BUILD = recipe("refl_sd35"), recipe("train_reward"), recipe("build_shapes")
COMPARE, SAVINGS = recipe("compare_runs"), recipe("savings")
ABLATE, EVALUATE = recipe("ablate_reward"), recipe("evaluate_reward")
GRPO, LPO, NFT = recipe("grpo_sd35"), recipe("lpo_sd35"), recipe("nft_sd35")
DPO, MINE = recipe("dpo_sd35"), recipe("mine_pairs")
PREPARE = recipe("prepare_pairs")


def words(*given: object) -> Callable[[World], Sequence[object]]:
    return lambda world: given


def settings(content: bytes | str) -> Callable[[World], Sequence[object]]:
    """--config with a file of this content."""
    return lambda world: ["--config", world.file("settings.yaml", content)]


def tiny(*more: str | Callable[[World], object]) -> Callable[[World], Sequence[object]]:
    """A run of a recipe on the tiny pipeline that would finish at once, and options; functions are given the World."""

    def make(world: World) -> Sequence[object]:
        world_of(world)
        given = [option(world) if callable(option) else option for option in more]
        return ["--model", world.root / "world", "--device=cpu", "--output_dir=run", "--loop.steps=1", *given]

    return make


def world_of(world: World) -> Path:
    """A world folder: the tiny pipeline and its reward."""
    folder = world.root / "world"
    if not folder.exists():
        folder.mkdir()
        (folder / "pipeline").symlink_to(world.pipeline_dir)
        (folder / "dinalrm").symlink_to(world.reward_dir)
        (folder / "pixel").symlink_to(world.clip_dir)
    return folder


def wide(world: World) -> Path:
    """A world folder whose VAE has a factor of 16."""
    folder = world.copy(world_of(world))
    config = folder / "pipeline" / "vae" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"block_out_channels": [8] * 5}))
    return folder


def prompts(content: bytes | str) -> Callable[[World], str]:
    return lambda world: f"--prompts={world.file('prompts.txt', content)}"


def run_of(module: str) -> Callable[[World], Path]:
    """A run of a recipe: a whole checkpoint of one number, and one setting that is this recipe's alone."""

    def make(world: World) -> Path:
        folder = world.fresh()
        parameters = {"number": torch.nn.Parameter(torch.zeros(1))}
        state = RunState(parameters, torch.optim.SGD(parameters.values()), step=1)
        log = MetricsLog(folder / "metrics.jsonl")
        save_checkpoint(folder, state, log=log, accelerator=Accelerator(cpu=True), keep_last=1)
        (folder / "config.yaml").write_text("refl:\n  batch_size: 1\n" if module == REFL else "lora_lr: 0.1\n")
        return folder

    return make


def resumed(module: str, *options: str, config: str = "") -> Callable[[World], Sequence[object]]:
    """--resume of a run of a recipe on the model `shapes`, whose config.yaml holds `config` too, and options."""

    def make(world: World) -> Sequence[object]:
        folder = run_of(module)(world)
        (folder / "config.yaml").write_text(f"model: shapes\n{config}")
        return ["--resume", folder, *options]

    return make


ROWS = '{"step": 0, "gold": 1.0, "proxy": 1.0}\n{"step": 1, "gold": 1.0, "proxy": 1.0}\n'


def measured(metrics: bytes | str, *, evaluation: str | None = None, copies: int = 1):
    """A run's folder with this metrics.jsonl; of several copies each is a group of its own."""

    def make(world: World) -> Sequence[object]:
        folders = []
        for _ in range(copies):
            folder = world.file("metrics.jsonl", metrics).parent
            (folder / "config.yaml").write_text("seed: 0\n")
            if evaluation is not None:
                (folder / "evaluations").mkdir()
                for step in (0, 1):
                    (folder / "evaluations" / f"{step:06d}.json").write_text(evaluation)
            folders.append(folder)
        return (
            folders
            if copies == 1
            else [word for folder in folders for word in ("--group", folder.parent.name + folder.name, folder)]
        )

    return make


def both(name: str, given: Callable[[World], Sequence[object]], names: str) -> list[Command]:
    return [Command(f"{name} ({module})", module, given, names) for module in (REFL, TRAIN)]


OPTIONS = [
    *both("an unknown option", words("--loop.step=3"), "--loop.step"),
    *both("an unknown word", words("go"), "go"),
    *both("no value", words("--seed"), "--seed"),
    *both("text for an integer", words("--seed=abc"), "seed abc"),
    *both("a fraction for an integer", words("--loop.steps=1.5"), "loop steps"),
    *both("truth for an integer", words("--loop.steps=true"), "loop steps"),
    *both("text for a number", words("--optim.lr=fast"), "optim lr"),
    *both("NaN", words("--optim.lr=.nan"), "optim lr nan"),
    *both("infinity", words("--optim.lr=.inf"), "optim lr inf"),
    *both("seed -1", words("--seed=-1"), "seed -1"),
    *both("no steps", words("--loop.steps=0"), "steps 0"),
    *both("no time to wait", words("--loop.timeout=0"), "loop timeout 0"),
    *both("an unknown choice", words("--optim.schedule=cosin"), "schedule cosin"),
    *both("an unknown device", words("--device=tpu"), "device tpu"),
    *both("an unknown tracker", words("--tracker=mlflow"), "tracker mlflow"),
    *both("a section of a number", words("--loop=5"), "loop"),
    *both("a section of null", words("--loop=null"), "loop"),
    *both("an unknown key in a section", words('--loop={"step": 3}'), "loop step"),
    *both("height 40", words("--height=40"), "height 40"),
    Command("reward level 400", REFL, words("--refl.reward_sigma=[400]"), "refl reward_sigma 400"),
    Command("a range of one", REFL, words("--refl.reward_sigma_range=[0.1]"), "reward_sigma_range"),
    Command("a range reversed", REFL, words("--refl.reward_sigma_range=[0.7,0.2]"), "reward_sigma_range 0.7 0.2"),
    Command("rank 0", REFL, words("--policy.rank=0"), "rank 0"),
    Command("KL below 0", REFL, words("--refl.kl_weight=-1"), "kl_weight -1"),
    Command("an unknown KL unit", REFL, words("--refl.kl_unit=std"), "kl_unit std"),
    Command("evaluation guidance text", NFT, words("--evaluation.guidance_scale=none"), "evaluation guidance_scale none"),
    Command("evaluation guidance below 0", DPO, words("--evaluation.guidance_scale=-1"), "evaluation guidance_scale -1"),
    Command("evaluation steps 0", REFL, words("--evaluation.num_steps=0"), "evaluation num_steps 0"),
    Command("an unknown loss", REFL, words("--refl.loss=square"), "loss square"),
    Command("taps beyond the layers", TRAIN, words("--reward.visual_taps=[1,99]"), "visual_taps 1 99"),
    Command("sigma 400", TRAIN, words("--reward.sigma=400"), "sigma 400"),
    Command("an unknown likelihood", TRAIN, words("--loss.likelihood=probit"), "likelihood probit"),
    Command("a density out of range", TRAIN, words("--train_sigma.value=2"), "value 2"),
    Command("full tuning", TRAIN, words("--reward.tuning=full"), "reward tuning"),
    Command("an unknown concept", TRAIN, words('--shapes_pairs.emphasis={"color": 2}'), "emphasis color"),
    Command("an unknown option (build)", BUILD, words("--stack.dept=3"), "--stack.dept"),
    Command("depth text (build)", BUILD, words("--stack.depth=deep"), "stack depth"),
    Command("depth 1 (build)", BUILD, words("--stack.depth=1"), "stack.depth 1"),
    Command("an unknown device (build)", BUILD, words("--device=banana"), "device banana"),
    Command("a batch of nothing (build)", BUILD, words("--vae.batch_size=0"), "batch_size 0"),
]  # fmt: skip

FILES = [
    *both("missing", words("--config=absent.yaml"), "absent.yaml"),
    *both("a folder", lambda w: ["--config", w.fresh()], "settings"),
    *both("a tab", settings("loop:\n\tsteps: 3\n"), "settings.yaml 2"),
    *both("not UTF-8", settings(b"seed: 1\n# \xff\n"), "settings.yaml UTF-8 2"),
    *both("binary", settings(bytes(range(256))), "settings.yaml UTF-8"),
    *both("NUL bytes", settings(b"seed: 1\0\n"), "settings.yaml NUL"),
    *both("empty", settings(""), "settings.yaml NoneType"),
    *both("a list", settings("- seed: 1\n"), "settings.yaml list"),
    *both("text", settings("seed\n"), "settings.yaml str"),
    *both("a key twice", settings("seed: 1\nseed: 2\n"), "settings.yaml 2 seed"),
    *both("a nested key twice", settings("loop:\n  steps: 1\n  steps: 2\n"), "settings.yaml 3 steps"),
    *both("an unknown key", settings("sede: 1\n"), "sede"),
    *both("an unknown nested key", settings("loop:\n  step: 3\n"), "loop step"),
    *both("a key that is a number", settings("1: 2\n"), "settings.yaml 1"),
    *both("a key that is a list", settings("? [a]\n: 2\n"), "settings.yaml"),
    *both("a bomb of aliases", settings("a: &a [1, 1]\nb: [*a, *a]\n"), "settings.yaml"),
    *both("an endless alias", settings("a: &a [*a]\n"), "settings.yaml"),
    *both("code", settings("seed: !!python/object/apply:os.getcwd []\n"), "settings.yaml"),
    *both("two documents", settings("seed: 1\n---\nseed: 2\n"), "settings.yaml"),
    Command("endless nesting", REFL, settings("[" * 2_000), "settings.yaml"),
    *both("a bracket left open", settings("loop: {steps: 1\n"), "settings.yaml"),
    *both("a section of null", settings("loop:\n"), "loop"),
    *both("a section of a list", settings("loop: [1]\n"), "loop [1]"),
    *both("truth for an integer", settings("seed: true\n"), "seed"),
    *both("a fraction for an integer", settings("seed: 1.5\n"), "seed"),
    *both("NaN", settings("optim:\n  lr: .nan\n"), "optim lr nan"),
    *both("a list for a number", settings("optim:\n  lr: [1]\n"), "optim lr"),
    Command("another recipe's", TRAIN, settings("refl:\n  batch_size: 2\n"), "settings.yaml refl"),
    Command("a tab (build)", BUILD, settings("\tseed: 1\n"), "settings.yaml 1"),
]  # fmt: skip

PLACES = [
    *both("a near model", words("--model=shape"), "shape"),
    *both("no model", words("--model="), "model"),
    *both("an empty folder as model", lambda w: ["--model", w.fresh()], "model_index.json"),
    *both("another pipeline", lambda w: ["--model", w.with_json(w.pipeline_dir, "model_index.json", _class_name="FluxPipeline")], "FluxPipeline"),
    *both("resume of nothing", words("--resume=absent"), "absent"),
    *both("resume of a file", lambda w: ["--resume", w.file("run", "x")], "resume"),
    *both("resume of a folder without a run", lambda w: ["--resume", w.fresh()], "resume"),
    *both("output_dir a file", lambda w: ["--model=shapes", "--output_dir", w.file("run", "x")], "output_dir"),
    Command("resume of another recipe's run", REFL, lambda w: ["--resume", run_of(TRAIN)(w)], "lora_lr"),
    Command("resume of another recipe's run, too", TRAIN, lambda w: ["--resume", run_of(REFL)(w)], "config.yaml refl"),
    Command("resume into another folder", REFL, lambda w: ["--resume", run_of(REFL)(w), "--output_dir=other"], "--resume --output_dir"),
    Command("a near reward", REFL, words("--model=shapes", "--reward=dinarlm"), "dinarlm"),
    Command("no pairs for sd35", TRAIN, words("--model=sd35"), "--pairs sd35"),
    Command("output_dir a file (build)", BUILD, lambda w: ["--output_dir", w.file("world", "x")], "world"),
]  # fmt: skip


def lora_of(rank: int) -> Callable[[World], object]:
    """--policy.init_from with a LoRA of this rank."""

    def word(world: World) -> str:
        layer = "transformer.transformer_blocks.0.attn.to_q"
        matrices = {f"{layer}.lora_A.weight": torch.ones(rank, 16), f"{layer}.lora_B.weight": torch.ones(16, rank)}
        path = world.fresh() / "lora.safetensors"
        save_file(matrices, path)
        return f"--policy.init_from={path}"

    return word


RESUMED = [
    *both("another seed", resumed(REFL, "--seed=1"), "seed 1 0 checkpoints"),
    *both("another model", resumed(REFL, "--model=owner/name"), "model owner/name shapes"),
    Command("another alpha", REFL, resumed(REFL, "--policy.alpha=16"), "policy.alpha 16 64"),
    Command("another rank", REFL, resumed(REFL, "--policy.rank=4"), "policy.rank 4 32"),
    Command("another gold", REFL, resumed(REFL, "--gold=pixel"), "gold pixel None"),
    Command("another reward", REFL, resumed(REFL, "--reward=pixel"), "reward pixel dinalrm"),
    Command("another gold in config.yaml", REFL, resumed(REFL, "--gold=oracle", config="gold: pixel\n"), "gold oracle pixel"),
    Command("other evaluation noise", REFL, resumed(REFL, "--evaluation.seed=5"), "evaluation.seed 5 1234"),
    Command("more evaluation samples", REFL, resumed(REFL, "--evaluation.samples=200"), "evaluation.samples 200 64"),
    Command("another size", REFL, resumed(REFL, "--height=128"), "height 128"),
    Command("another noise level", REFL, resumed(REFL, "--refl.reward_sigma=[0.3]"), "refl.reward_sigma 0.3"),
    Command("fewer steps of sampling", REFL, resumed(REFL, "--refl.num_steps=4"), "refl.num_steps 4"),
    Command("another VAE dtype", REFL, resumed(REFL, "--memory.vae_dtype=bfloat16"), "memory.vae_dtype bfloat16"),
    Command("an anchor", REFL, resumed(REFL, "--anchor.reward=pixel"), "anchor.reward pixel"),
    Command("another head", TRAIN, resumed(TRAIN, "--reward.head.dropout=0.5"), "reward.head.dropout 0.5"),
    Command("another likelihood", TRAIN, resumed(TRAIN, "--loss.likelihood=bradley_terry"), "loss.likelihood"),
    Command("a window beyond the run's range", GRPO,
            resumed(GRPO, "--grpo.window_size=8", config="grpo:\n  window_range: [0, 7]\n"), "window_range 0 7 config.yaml"),
    Command("more groups' samples", GRPO, resumed(GRPO, "--grpo.group_size=4"), "grpo.group_size 4 8"),
    Command("another depth (build)", BUILD, lambda w: ["--output_dir", w.file("config.yaml", "stack:\n  depth: 8\n").parent, "--stack.depth=4"], "stack.depth 4 8"),
    Command("another seed (build)", BUILD, lambda w: ["--output_dir", w.file("config.yaml", "seed: 3\n").parent], "seed 0 3"),
    *both("no path", words("--output_dir="), "output_dir"),
    Command("no prompts", REFL, words("--prompts="), "prompts"),
    Command("no reward", REFL, words("--reward="), "reward"),
]  # fmt: skip

RUNS = [
    Command("a GPU that is not there", REFL, tiny("--device=cuda"), "device cuda"),
    Command("a GPU that is not there (train)", TRAIN, tiny("--device=cuda"), "device cuda"),
    Command("a GPU that is not there (build)", BUILD, words("--device=cuda"), "device cuda"),
    Command("an unknown quantisation", REFL, tiny("--memory.base_quant=int3"), "memory base_quant int3"),
    Command("a kernel on a CPU", REFL, tiny("--memory.attention=flash"), "memory attention flash"),
    Command("a slice of none", REFL, tiny("--memory.decode_slice=0"), "memory decode_slice 0"),
    Command("an unknown optimiser", REFL, tiny("--optim.name=adam8"), "optim name adam8"),
    Command("no prompt file", REFL, tiny("--prompts=absent.txt"), "absent.txt"),
    Command("a folder of prompts", REFL, tiny(lambda w: f"--prompts={w.fresh()}"), "prompt"),
    Command("empty prompts", REFL, tiny(prompts(" \n")), "prompts.txt"),
    Command("Latin-1 prompts", REFL, tiny(prompts(b"B\xe4r")), "prompts.txt UTF-8 1"),
    Command("prompts with NUL", REFL, tiny(prompts(b"a\0b")), "prompts.txt NUL"),
    Command("a prompt of a million characters", REFL, tiny(prompts("a" * 1_000_000)), "prompts.txt 1000000"),
    Command("prompts on the hub without datasets", REFL, tiny("--prompts=owner/name"), "owner/name pip dinalrm-align[data]"),
    Command("a split on the hub without datasets", REFL, tiny("--eval_prompts=owner/name:test"), "owner/name pip"),
    Command("a missing file that looks like a hub id", REFL, tiny("--prompts=lists/absent.csv"), "lists/absent.csv"),
    Command("no held-out prompts", REFL, tiny("--eval_prompts=absent.txt"), "absent.txt"),
    Command("no images", REFL, tiny("--refl.pretrain_weight=1", "--refl.pretrain_images=absent"), "absent"),
    Command("a height beyond the positions", REFL, tiny("--height=2048"), "height 2048 pixels 192"),
    Command("a width beyond the positions", REFL, tiny("--width=208"), "width 208 pixels 192"),
    *(Command(f"a size beyond the positions ({module})", module, tiny("--height=64", "--width=2048"), "width 2048 pixels 192")
      for module in (GRPO, LPO, NFT, DPO, TRAIN)),
    Command("a side of half a patch of this model", REFL, tiny(lambda w: f"--model={wide(w)}", "--height=48"), "height 48 pixels 32"),
    Command("a size the oracle does not score", REFL, tiny("--height=32"), "32 64"),
    Command("no reward folder", REFL, tiny("--reward=./absent"), "reward absent"),
    Command("a reward cut short", REFL, tiny(lambda w: f"--reward={w.with_bytes(w.reward_dir, 'model.safetensors', b'x')}"), "model.safetensors"),
    Command("a reward of another config", REFL, tiny(lambda w: f"--reward={w.with_json(w.reward_dir, 'config.json', sigma='x')}"), "sigma str x"),
    Command("no LoRA to start from", REFL, tiny("--policy.init_from=./absent"), "LoRA absent"),
    Command("a folder without a LoRA to start from", REFL, tiny(lambda w: f"--policy.init_from={w.reward_dir}"), "pytorch_lora_weights.safetensors model.safetensors"),
    Command("a LoRA of text to start from", GRPO, tiny(lambda w: f"--policy.init_from={w.file('lora.safetensors', 'text')}"), "lora.safetensors"),
    Command("a LoRA to start from of a larger rank", NFT, tiny(lora_of(rank=3), "--policy.rank=2"), "rank 3 2 policy.rank"),
    Command("no LoRA to sample with", MINE, lambda w: ["--model", world_of(w), "--device=cpu", "--lora=./absent"], "LoRA absent"),
    Command("no pairs", TRAIN, tiny("--pairs=absent"), "absent index.json"),
    Command("no jsonl", TRAIN, tiny("--pairs=absent.jsonl"), "absent.jsonl"),
    Command("a jsonl of text", TRAIN, tiny(lambda w: f"--pairs={w.file('p.jsonl', 'text')}"), "p.jsonl 1"),
    Command("pairs of another length", TRAIN, tiny(lambda w: f"--pairs={w.pairs_dir}", "--held_out_prompts=1", "--reward.num_layers=2", "--reward.visual_taps=[1]", "--reward.text_taps=[1]", "--reward.text_length=20"), "text_length 16"),
    Command("pairs cut short", TRAIN, tiny(lambda w: f"--pairs={w.with_bytes(w.pairs_dir, 'groups.safetensors', b'x')}"), "groups.safetensors"),
    Command("more layers than blocks", TRAIN, tiny(lambda w: f"--pairs={w.pairs_dir}", "--held_out_prompts=1", "--batch_size=1", "--reward.text_length=16", "--reward.num_layers=9", "--reward.visual_taps=[1]", "--reward.text_taps=[1]"), "num_layers 9"),
    Command("more held out than there is", TRAIN, tiny(lambda w: f"--pairs={w.pairs_dir}", "--held_out_prompts=99", "--reward.text_length=16"), "99 4"),
]  # fmt: skip

EVALUATION = json.dumps({"gold": [1.0], "proxy": [1.0], "terms": {"prompts": ["a"]}})

COMPARED = [
    Command("no run", COMPARE, words(), "runs"),
    Command("an unknown option", COMPARE, words("absent", "--outpt=a"), "--outpt"),
    Command("no images", COMPARE, words("absent", "--shown=0"), "shown 0"),
    Command("folders that are not there", COMPARE, words("absent", "gone"), "absent gone"),
    Command("a group of a folder that is not there", COMPARE, words("--group", "a", "absent"), "absent"),
    Command("a group without a name", COMPARE, words("--group"), "--group"),
    Command("a group without runs", COMPARE, words("--group", "latent"), "latent"),
    Command("a line that is no JSON", COMPARE, measured("step 0\n"), "metrics.jsonl 1"),
    Command("a line without its step", COMPARE, measured('{"gold": 1}\n'), "metrics.jsonl 1"),
    Command("a line of a list", COMPARE, measured("[1]\n"), "metrics.jsonl 1"),
    Command("a metric of text", COMPARE, measured('{"step": 1, "gold": "high"}\n'), "gold high"),
    Command("not UTF-8", COMPARE, measured(b"\xff\n"), "metrics.jsonl UTF-8"),
    Command("no evaluation", COMPARE, measured('{"step": 1, "loss": 1.0}\n'), "evaluation"),
    Command("no evaluation in a group", COMPARE, measured('{"step": 1, "loss": 1.0}\n', copies=2), "evaluation"),
    Command("evaluations missing", COMPARE, measured(ROWS, copies=2), "000000.json"),
    Command("evaluations of text", COMPARE, measured(ROWS, evaluation="gold", copies=2), "000000.json"),
    Command("evaluations without terms", COMPARE, measured(ROWS, evaluation="{}"), "000000.json"),
    Command("evaluations of text scores", COMPARE, measured(ROWS, evaluation=EVALUATION.replace("1.0", '"a"'), copies=2), "000000.json"),
    Command("evaluations of too few", COMPARE, measured(ROWS, evaluation=EVALUATION.replace("[1.0]", "[]")), "000000.json"),
]  # fmt: skip

SAVED = [
    Command("no multiple of 16", SAVINGS, words("--size=1000"), "size 1000 pixels"),
    Command("a batch of none", SAVINGS, words("--batch=0"), "batch 0"),
    Command("nine levels", SAVINGS, words("--levels=9"), "levels 9"),
    Command("an unknown option", SAVINGS, words("--mesure"), "--mesure"),
]  # fmt: skip

EVALUATING = [
    Command("an unknown arm", ABLATE, words("--arms=[calibratd]"), "arms calibratd"),
    Command("an arm twice", ABLATE, words("--arms=[fixed,fixed]"), "arms fixed"),
    Command("no seeds", ABLATE, words("--seeds=[]"), "seeds"),
    Command("a negative seed", ABLATE, words("--seeds=[-1]"), "seeds -1"),
    Command("no steps", ABLATE, words("--steps=0"), "steps 0"),
    Command("a level above 1", ABLATE, words("--sigmas=[0.4,1.5]"), "1.5"),
    Command("an empty ensemble", ABLATE, words("--ensembles=[[]]"), "ensembles"),
    Command("no training settings", ABLATE, words("--training=absent.yaml"), "absent.yaml"),
    Command("training settings with a typing error", ABLATE, lambda w: ["--training", w.file("t.yaml", "lop: 1\n")], "t.yaml lop"),
    Command("a model without pairs", ABLATE, words("--model=sd35"), "sd35 --pairs --test_sets"),
    Command("a near option (ablation)", ABLATE, words("--arm=[fixed]"), "--arm"),
    Command("a near model (ablation)", ABLATE, words("--model=shape"), "shape"),
    Command("a size beyond the positions (evaluate)", EVALUATE, words("--size=2048"), "size 2048 pixels 192"),
    Command("no levels", EVALUATE, words("--sigmas=[]"), "sigmas"),
    Command("calibration elsewhere", EVALUATE, words("--calibrated_at=[0.15]"), "calibrated_at 0.15"),
    Command("a seed of noise below 0", EVALUATE, words("--noise_seed=-1"), "noise_seed -1"),
    Command("an unknown likelihood", EVALUATE, words("--loss.likelihood=probit"), "likelihood probit"),
    Command("no reward there", EVALUATE, words("--model=shapes", "--reward=absent"), "absent"),
    Command("no reward in that folder", EVALUATE, words("--model=shapes", "--reward=dinalrm=absent"), "absent"),
    Command("an unknown protocol", EVALUATE, words("--test_sets={hpdv3: x}", "--protocol={hpdv3: poled}"), "protocol poled"),
    Command("a protocol of lists for pairs", EVALUATE, words("--test_sets={hpdv3: x}", "--protocol={hpdv3: hpsv2}"), "protocol hpsv2"),
    Command("a protocol of no set", EVALUATE, words("--test_sets={hpdv3: x}", "--protocol={hpdv2: mps}"), "protocol hpdv2"),
    Command("a public set that is not there", EVALUATE, words("--test_sets={hpdv3: absent}", "--reward=oracle"), "hpdv3 absent"),
    Command("a folder that is no public set", EVALUATE, lambda w: [f"--test_sets={{imagereward: {w.fresh()}}}", "--reward=oracle"], "imagereward"),
    Command("a set too large for the hub", EVALUATE, words("--test_sets={hpdv3: hub}", "--reward=oracle"), "hpdv3 hub"),
    Command("no sets", EVALUATE, words("--test_sets={}"), "test_sets"),
    Command("a set that is no name", EVALUATE, words("--test_sets={a/b: x}"), "test_sets a/b"),
    Command("a size that patches do not divide", EVALUATE, words("--size=1000"), "size 1000"),
    Command("too few resamples", EVALUATE, words("--bootstrap=1"), "bootstrap 1"),
    Command("an unknown way to fit", EVALUATE, words("--fit=pad"), "fit pad"),
    Command("nothing that was trained on", EVALUATE, lambda w: [f"--test_sets={{hpdv3: {w.file('test.json', '[]')}}}", "--reward=oracle", "--trained_on=absent.json"], "absent.json"),
    Command("a model without pairs (evaluation)", EVALUATE, words("--model=sd35"), "sd35 --test_sets"),
    Command("test_sets is no mapping", EVALUATE, words("--test_sets=[a]"), "test_sets"),
]  # fmt: skip

METHODS = [
    Command("a group of one", GRPO, words("--grpo.group_size=1"), "grpo group_size 1"),
    Command("one step of GRPO", GRPO, words("--grpo.num_steps=1"), "grpo num_steps 1"),
    Command("no noise in GRPO", GRPO, words("--grpo.noise_level=0"), "grpo noise_level 0"),
    Command("an unknown sampler", GRPO, words("--grpo.sampler=ode"), "sampler ode"),
    Command("an unknown window", GRPO, words("--grpo.window=some"), "window some"),
    Command("a negative clip range", GRPO, words("--grpo.clip_range=-1e-4"), "grpo clip_range -1e-4"),
    Command("a negative KL (GRPO)", GRPO, words("--grpo.kl_beta=-1"), "grpo kl_beta -1"),
    Command("a level above 1 (GRPO)", GRPO, words("--grpo.reward_sigma=[1.2]"), "grpo reward_sigma 1.2"),
    Command("an unknown reward (GRPO)", GRPO, words("--model=shapes", "--reward=pickscor"), "pickscor"),
    Command("half a sum", GRPO, words("--model=shapes", "--reward=dinalrm + "), "dinalrm"),
    Command("a weight without a reward", GRPO, words("--model=shapes", "--reward=0.2 pixel"), "0.2 pixel"),
    Command("a weight of 0", GRPO, words("--model=shapes", "--reward=0*pixel"), "weight 0"),
    Command("a part twice", GRPO, words("--model=shapes", "--reward=pixel + pixel"), "pixel"),
    Command("a source of nothing", GRPO, words("--model=shapes", "--reward=pixel="), "pixel="),
    Command("an unknown gold", GRPO, words("--model=shapes", "--gold=orcle"), "orcle"),
    Command("a reward without gradient for ReFL", REFL, words("--model=shapes", "--reward=oracle"), "oracle"),
    Command("an unknown variant", REFL, words("--refl.variant=drafts"), "variant drafts"),
    Command("an anchor every 0 updates", REFL, words("--anchor.reward=pixel", "--anchor.every=0"), "anchor every 0"),
    Command("an unknown tracker", REFL, words("--tracker=mlflow"), "tracker mlflow"),
    Command("one candidate", LPO, words("--lpo.candidates=1"), "lpo candidates 1"),
    Command("a threshold of 1", LPO, words("--lpo.threshold=[0.5,1.0]"), "lpo threshold"),
    Command("no noise in LPO", LPO, words("--lpo.noise_level=0"), "noise_level 0"),
    Command("a tolerance beyond the clip", GRPO, words("--grpo.clip_range=3e-6", "--grpo.ratio_tolerance=1e-5"), "ratio_tolerance 1e-05 3e-06"),
    Command("a tolerance of the clip", GRPO, words("--grpo.ratio_tolerance=1e-4"), "ratio_tolerance 0.0001"),
    Command("no tolerance", GRPO, words("--grpo.ratio_tolerance=0"), "ratio_tolerance 0"),
    Command("a clip below the tolerance", GRPO, settings("grpo: {ratio_tolerance: 5.0e-5, clip_range: 1.0e-5}"), "ratio_tolerance 5e-05"),
    Command("no text", REFL, words("--text_length=0"), "text_length 0"),
    Command("text beyond T5's", GRPO, words("--text_length=513"), "text_length 513"),
    Command("text of a word", NFT, words("--text_length=long"), "text_length long"),
    Command("text of half a token", MINE, words("--text_length=12.5"), "text_length 12.5"),
    Command("text in a file", DPO, settings("text_length: -1"), "text_length -1"),
    Command("draft_lv after the end", REFL, words("--refl.draft_lv_earliest=1.5"), "draft_lv_earliest 1.5"),
    Command("an unknown schedule (NFT)", NFT, words("--nft.schedule=cosine"), "schedule cosine"),
    Command("keep some", NFT, words("--nft.keep_equal=some"), "keep_equal some"),
    Command("more levels than steps", NFT, tiny("--nft.num_steps=4", "--nft.levels=9"), "levels 9"),
    Command("settings of another method", GRPO, lambda w: ["--config", RECIPES / "nft_sd35_flow_factory.yaml"], "nft_sd35_flow_factory.yaml nft"),
    Command("samples of nobody", DPO, words("--dpo.sampler=base"), "sampler base"),
    Command("no draws", DPO, words("--dpo.draws=0"), "draws 0"),
    Command("levels upside down", NFT, words("--nft.earliest=0.8", "--nft.latest=0.2"), "earliest 0.8"),
    Command("a group of one (NFT)", NFT, words("--nft.group_size=1"), "nft group_size 1"),
    Command("beta 0", DPO, words("--dpo.beta=0"), "dpo beta 0"),
    Command("an unknown mode", DPO, words("--dpo.mode=sideways"), "mode sideways"),
    Command("pairs online", DPO, words("--pairs=pairs"), "--pairs"),
    Command("offline without pairs", DPO, words("--dpo.mode=offline"), "--pairs"),
    Command("one candidate to mine from", MINE, words("--mine.candidates=1"), "mine candidates 1"),
    Command("a negative gap", MINE, words("--mine.min_gap=-1"), "mine min_gap -1"),
    Command("a size beyond the positions (mine)", MINE, words("--model=shapes", "--height=2048"), "height 2048 pixels 192"),
    Command("no prompts to mine", MINE, words("--max_prompts=0"), "max_prompts 0"),
    Command("another recipe's section", MINE, words("--grpo.group_size=4"), "--grpo.group_size"),
]  # fmt: skip


def preparing(content: bytes | str, *more: str, name: str = "pairs.jsonl") -> Callable[[World], Sequence[object]]:
    """A preparation, on the tiny pipeline, of a file of this content."""
    return lambda world: [
        "--source", world.file(name, content), "--model", world_of(world), "--device=cpu", "--workers=0",
        "--output_dir", world.fresh() / "out", "--buckets=64x64", *more,
    ]  # fmt: skip


PREPARING = [
    Command("no source", PREPARE, words(), "source"),
    Command("a source that is not there", PREPARE, words("--model=shapes", "--source=absent.json"), "absent.json"),
    Command("an unknown layout", PREPARE, words("--source=x", "--layout=hpdv4"), "layout hpdv4"),
    Command("a near option (prepare)", PREPARE, words("--source=x", "--bucket=64x64"), "--bucket"),
    Command("buckets of words", PREPARE, words("--source=x", "--buckets=large"), "buckets large"),
    Command("an odd bucket", PREPARE, words("--source=x", "--buckets=64x40"), "buckets 64x40"),
    Command("a bucket beyond the positions", PREPARE, words("--source=x", "--buckets=64x64,64x2048"), "64x2048 width 2048 192"),
    Command("buckets of an area beyond the positions", PREPARE, words("--source=x", "--buckets=area:1024"), "buckets pixels 192"),
    Command("a bucket twice", PREPARE, words("--source=x", "--buckets=64x64,64x64"), "buckets 64x64,64x64"),
    Command("a share of votes of 2", PREPARE, words("--source=x", "--filter.min_vote_share=2"), "filter min_vote_share 2"),
    Command("no pairs of a prompt", PREPARE, words("--source=x", "--filter.max_pairs_per_prompt=0"), "max_pairs_per_prompt 0"),
    Command("an unknown way with ties", PREPARE, words("--source=x", "--filter.ties=halve"), "ties halve"),
    Command("an unknown way with what is bad", PREPARE, words("--source=x", "--on_bad=ignore"), "on_bad ignore"),
    Command("no text (prepare)", PREPARE, words("--source=x", "--text_length=0"), "text_length 0"),
    Command("text that no reward reads", PREPARE, words("--source=x", "--text_length=600"), "text_length 600"),
    Command("workers below 0", PREPARE, words("--source=x", "--workers=-1"), "workers -1"),
    Command("a shard of one image", PREPARE, words("--source=x", "--shard_size=1"), "shard_size 1"),
    Command("records of something else", PREPARE, preparing('[{"a": 1}]', name="train.json"), "train.json"),
    Command("a train.json of an object", PREPARE, preparing("{}", name="train.json"), "train.json list"),
    Command("a train.json cut short", PREPARE, preparing('[{"path1":', name="train.json"), "train.json"),
    Command("a line that is no JSON (prepare)", PREPARE, preparing("{"), "pairs.jsonl 1"),
    Command("a pair without an image", PREPARE, preparing('{"prompt": "a", "chosen": "c.png"}'), "rejected"),
    Command("an image that is not there", PREPARE, preparing('{"prompt": "a", "chosen": "c.png", "rejected": "r.png"}'), "c.png"),
    Command("pairs without votes that mean anything", PREPARE, preparing('{"prompt": "a", "chosen": "c", "rejected": "r", "votes": "9"}'), "votes 9"),
    Command("votes 0:0 (prepare)", PREPARE, preparing('{"prompt": "a", "chosen": "c", "rejected": "r", "votes": [0, 0]}'), "pairs.jsonl 1 votes"),
    Command("a text length beyond every reward", PREPARE, words("--source=x", "--text_length=600"), "text_length 600"),
    Command("an empty source", PREPARE, preparing(""), "pairs.jsonl 0"),
    Command("a folder without parquet", PREPARE, lambda w: ["--source", w.fresh(), "--model", world_of(w), "--device=cpu"], "parquet"),
    Command("batches ahead below 0", TRAIN, words("--prefetch=-1"), "prefetch -1"),
]  # fmt: skip

GROUPS = {
    "preparing pairs": PREPARING,
    "methods and rewards by name": METHODS,
    "evaluating rewards": EVALUATING,
    "options": OPTIONS,
    "settings files": FILES,
    "models, rewards and folders": PLACES,
    "resumed runs": RESUMED,
    "what a run reads": RUNS,
    "compare_runs": COMPARED,
    "savings": SAVED,
}
