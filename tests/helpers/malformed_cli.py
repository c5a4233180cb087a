"""Invalid command lines of the recipes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from malformed import Command, World

REFL, TRAIN, BUILD = "refl_sd35", "train_reward", "build_shapes"
COMPARE, SAVINGS = "compare_runs", "savings"
ABLATE, EVALUATE = "ablate_reward", "evaluate_reward"
GRPO, LPO, NFT, DPO, MINE = "grpo_sd35", "lpo_sd35", "nft_sd35", "dpo_sd35", "mine_pairs"
PREPARE, LOADING = "prepare_pairs", "measure_loading"


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


def prompts(content: bytes | str) -> Callable[[World], str]:
    return lambda world: f"--prompts={world.file('prompts.txt', content)}"


def run_of(module: str) -> Callable[[World], Path]:
    """A run of a recipe: a whole checkpoint of one number, and one setting that is this recipe's alone."""

    def make(world: World) -> Path:
        import torch
        from accelerate import Accelerator

        from dinalrm_align.train.checkpoints import save_checkpoint
        from dinalrm_align.train.metrics import MetricsLog
        from dinalrm_align.train.state import RunState

        folder = world.fresh()
        parameters = {"number": torch.nn.Parameter(torch.zeros(1))}
        state = RunState(parameters, torch.optim.SGD(parameters.values()), step=1)
        log = MetricsLog(folder / "metrics.jsonl")
        save_checkpoint(folder, state, log=log, accelerator=Accelerator(cpu=True), keep_last=1)
        (folder / "config.yaml").write_text("refl:\n  batch_size: 1\n" if module == REFL else "lora_lr: 0.1\n")
        return folder

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


def both(name: str, given: Callable[[World], Sequence[object]], says: str) -> list[Command]:
    return [Command(f"{name} ({module})", module, given, says) for module in (REFL, TRAIN)]


OPTIONS = [
    *both("an unknown option", words("--loop.step=3"), "did you mean '--loop.steps'?"),
    *both("an unknown word", words("go"), "unknown option go"),
    *both("no value", words("--seed"), "expected one argument"),
    *both("text for an integer", words("--seed=abc"), "seed"),
    *both("a fraction for an integer", words("--loop.steps=1.5"), "loop.steps"),
    *both("truth for an integer", words("--loop.steps=true"), "loop.steps"),
    *both("text for a number", words("--optim.lr=fast"), "optim.lr"),
    *both("NaN", words("--optim.lr=.nan"), "optim.lr: got nan"),
    *both("infinity", words("--optim.lr=.inf"), "optim.lr: got inf"),
    *both("seed -1", words("--seed=-1"), "seed"),
    *both("no steps", words("--loop.steps=0"), "steps 0"),
    *both("no time to wait", words("--loop.timeout=0"), "loop.timeout: got 0"),
    *both("an unknown choice", words("--optim.schedule=cosin"), "cosin"),
    *both("an unknown device", words("--device=tpu"), "tpu"),
    *both("an unknown tracker", words("--tracker=mlflow"), "mlflow"),
    *both("a section of a number", words("--loop=5"), "loop"),
    *both("a section of null", words("--loop=null"), "loop"),
    *both("an unknown key in a section", words('--loop={"step": 3}'), "step"),
    *both("height 40", words("--height=40"), "multiple of 16"),
    Command("reward level 400", REFL, words("--refl.reward_sigma=[400]"), "refl.reward_sigma: got 400"),
    Command("a range of one", REFL, words("--refl.reward_sigma_range=[0.1]"), "reward_sigma_range"),
    Command("a range reversed", REFL, words("--refl.reward_sigma_range=[0.7,0.2]"), "low <= high"),
    Command("rank 0", REFL, words("--policy.rank=0"), "rank 0"),
    Command("KL below 0", REFL, words("--refl.kl_weight=-1"), "refl.kl_weight: got -1"),
    Command("an unknown loss", REFL, words("--refl.loss=square"), "square"),
    Command("taps beyond the layers", TRAIN, words("--reward.visual_taps=[1,99]"), "visual_taps: got (1, 99)"),
    Command("sigma 400", TRAIN, words("--reward.sigma=400"), "sigma: got 400"),
    Command("an unknown likelihood", TRAIN, words("--loss.likelihood=probit"), "probit"),
    Command("a density out of range", TRAIN, words("--train_sigma.value=2"), "value 2"),
    Command("full tuning", TRAIN, words("--reward.tuning=full"), "reward.tuning: got full"),
    Command("an unknown concept", TRAIN, words('--shapes_pairs.emphasis={"color": 2}'), "did you mean 'colour'"),
    Command("an unknown option (build)", BUILD, words("--stack.dept=3"), "did you mean '--stack.depth'?"),
    Command("depth text (build)", BUILD, words("--stack.depth=deep"), "stack.depth"),
    Command("depth 1 (build)", BUILD, words("--stack.depth=1"), "dual_attention_layers"),
    Command("an unknown device (build)", BUILD, words("--device=banana"), "banana"),
    Command("a batch of nothing (build)", BUILD, words("--vae.batch_size=0"), "stage.batch_size: got 0"),
]  # fmt: skip

FILES = [
    *both("missing", words("--config=absent.yaml"), "no settings file absent.yaml"),
    *both("a folder", lambda w: ["--config", w.fresh()], "(it is a folder)"),
    *both("a tab", settings("loop:\n\tsteps: 3\n"), "line 2: found character '\\t'"),
    *both("not UTF-8", settings(b"seed: 1\n# \xff\n"), "is not UTF-8 (line 2)"),
    *both("binary", settings(bytes(range(256))), "is not UTF-8"),
    *both("NUL bytes", settings(b"seed: 1\0\n"), "holds a NUL byte"),
    *both("empty", settings(""), "got NoneType, expected a mapping"),
    *both("a list", settings("- seed: 1\n"), "got list, expected a mapping"),
    *both("text", settings("seed\n"), "got str, expected a mapping"),
    *both("a key twice", settings("seed: 1\nseed: 2\n"), "line 2: key 'seed' stands twice"),
    *both("a nested key twice", settings("loop:\n  steps: 1\n  steps: 2\n"), "line 3: key 'steps' stands twice"),
    *both("an unknown key", settings("sede: 1\n"), "unknown key sede; did you mean 'seed'?"),
    *both("an unknown nested key", settings("loop:\n  step: 3\n"), "unknown key loop.step; did you mean 'steps'?"),
    *both("a key that is a number", settings("1: 2\n"), "unknown key 1"),
    *both("a key that is a list", settings("? [a]\n: 2\n"), "a key that is no plain name"),
    *both("a bomb of aliases", settings("a: &a [1, 1]\nb: [*a, *a]\n"), "alias *a; write the value out"),
    *both("an endless alias", settings("a: &a [*a]\n"), "alias *a"),
    *both("code", settings("seed: !!python/object/apply:os.getcwd []\n"), "could not determine a constructor"),
    *both("two documents", settings("seed: 1\n---\nseed: 2\n"), "another document"),
    Command("endless nesting", REFL, settings("[" * 2_000), "nested too deeply"),
    *both("a bracket left open", settings("loop: {steps: 1\n"), "not YAML"),
    *both("a section of null", settings("loop:\n"), "loop: got None; expected a section"),
    *both("a section of a list", settings("loop: [1]\n"), "loop: got [1]; expected a section"),
    *both("truth for an integer", settings("seed: true\n"), "seed"),
    *both("a fraction for an integer", settings("seed: 1.5\n"), "seed"),
    *both("NaN", settings("optim:\n  lr: .nan\n"), "optim.lr: got nan"),
    *both("a list for a number", settings("optim:\n  lr: [1]\n"), "optim.lr"),
    Command("another recipe's", TRAIN, settings("refl:\n  batch_size: 2\n"), "unknown key refl"),
    Command("a tab (build)", BUILD, settings("\tseed: 1\n"), "found character '\\t'"),
]  # fmt: skip

PLACES = [
    *both("a near model", words("--model=shape"), "unknown model 'shape'; did you mean 'shapes'?"),
    *both("no model", words("--model="), "unknown model ''"),
    *both("an empty folder as model", lambda w: ["--model", w.fresh()], "lacks model_index.json"),
    *both("another pipeline", lambda w: ["--model", w.with_json(w.pipeline_dir, "model_index.json", _class_name="FluxPipeline")], "FluxPipeline"),
    *both("resume of nothing", words("--resume=absent"), "nothing to resume: no folder absent"),
    *both("resume of a file", lambda w: ["--resume", w.file("run", "x")], "nothing to resume"),
    *both("resume of a folder without a run", lambda w: ["--resume", w.fresh()], "nothing to resume"),
    *both("output_dir a file", lambda w: ["--model=shapes", "--output_dir", w.file("run", "x")], "is a file; choose a folder"),
    Command("resume of another recipe's run", REFL, lambda w: ["--resume", run_of(TRAIN)(w)], "unknown key lora_lr"),
    Command("resume of another recipe's run, too", TRAIN, lambda w: ["--resume", run_of(REFL)(w)], "unknown key refl"),
    Command("resume into another folder", REFL, lambda w: ["--resume", run_of(REFL)(w), "--output_dir=other"], "leave out --output_dir other"),
    Command("a near reward", REFL, words("--model=shapes", "--reward=dinarlm"), "did you mean 'dinalrm'? Known: dinalrm, pickscore"),
    Command("no pairs for sd35", TRAIN, words("--model=sd35"), "pass --pairs"),
    Command("output_dir a file (build)", BUILD, lambda w: ["--output_dir", w.file("world", "x")], "cannot be a folder"),
]  # fmt: skip

RUNS = [
    Command("a GPU that is not there", REFL, tiny("--device=cuda"), "torch finds no CUDA GPU"),
    Command("a GPU that is not there (train)", TRAIN, tiny("--device=cuda"), "torch finds no CUDA GPU"),
    Command("a GPU that is not there (build)", BUILD, words("--device=cuda"), "torch finds no CUDA GPU"),
    Command("an unknown quantisation", REFL, tiny("--base_quant=int3"), "int3"),
    Command("a kernel on a CPU", REFL, tiny("--memory.attention=flash"), "chooses among CUDA kernels"),
    Command("a slice of none", REFL, tiny("--memory.decode_slice=0"), "memory.decode_slice: got 0"),
    Command("an unknown optimiser", REFL, tiny("--optim.name=adam8"), "adam8"),
    Command("no prompt file", REFL, tiny("--prompts=absent.txt"), "no prompt file absent.txt"),
    Command("a folder of prompts", REFL, tiny(lambda w: f"--prompts={w.fresh()}"), "(it is a folder)"),
    Command("empty prompts", REFL, tiny(prompts(" \n")), "is empty"),
    Command("Latin-1 prompts", REFL, tiny(prompts(b"B\xe4r")), "is not UTF-8 (line 1)"),
    Command("prompts with NUL", REFL, tiny(prompts(b"a\0b")), "holds a NUL byte"),
    Command("a prompt of a million characters", REFL, tiny(prompts("a" * 1_000_000)), "got 1000000 characters"),
    Command("no held-out prompts", REFL, tiny("--eval_prompts=absent.txt"), "no prompt file absent.txt"),
    Command("no pictures", REFL, tiny("--refl.pretrain_weight=1", "--refl.pretrain_pictures=absent"), "no folder absent"),
    Command("a size the oracle does not judge", REFL, tiny("--height=32"), "S a multiple of 64: got"),
    Command("no reward folder", REFL, tiny("--reward=./absent"), "no reward at './absent'"),
    Command("a reward cut short", REFL, tiny(lambda w: f"--reward={w.with_bytes(w.reward_dir, 'model.safetensors', b'x')}"), "not a readable safetensors file"),
    Command("a reward of another config", REFL, tiny(lambda w: f"--reward={w.with_json(w.reward_dir, 'config.json', sigma='x')}"), "sigma: got str 'x'"),
    Command("no pairs", TRAIN, tiny("--pairs=absent"), "absent holds no index.json"),
    Command("no jsonl", TRAIN, tiny("--pairs=absent.jsonl"), "no file of pairs absent.jsonl"),
    Command("a jsonl of text", TRAIN, tiny(lambda w: f"--pairs={w.file('p.jsonl', 'text')}"), "line 1: not valid JSON"),
    Command("pairs of another length", TRAIN, tiny(lambda w: f"--pairs={w.pairs_dir}", "--held_out_prompts=1", "--reward.num_layers=2", "--reward.visual_taps=[1]", "--reward.text_taps=[1]", "--reward.text_length=20"), "written with text_length 14"),
    Command("pairs cut short", TRAIN, tiny(lambda w: f"--pairs={w.with_bytes(w.pairs_dir, 'groups.safetensors', b'x')}"), "groups.safetensors"),
    Command("more layers than blocks", TRAIN, tiny(lambda w: f"--pairs={w.pairs_dir}", "--held_out_prompts=1", "--batch_size=1", "--reward.text_length=14", "--reward.num_layers=9", "--reward.visual_taps=[1]", "--reward.text_taps=[1]"), "num_layers: got 9"),
    Command("more held out than there is", TRAIN, tiny(lambda w: f"--pairs={w.pairs_dir}", "--held_out_prompts=99", "--reward.text_length=14"), "leave nothing to train on"),
]  # fmt: skip

EVALUATION = json.dumps({"gold": [1.0], "proxy": [1.0], "terms": {"prompts": ["a"]}})

COMPARED = [
    Command("no run", COMPARE, words(), "runs: got none"),
    Command("an unknown option", COMPARE, words("absent", "--outpt=a"), "unknown option --outpt=a"),
    Command("no images", COMPARE, words("absent", "--shown=0"), "shown: got 0"),
    Command("folders that are not there", COMPARE, words("absent", "gone"), "no run to compare. Skipped, no metrics.jsonl and config.yaml: absent, gone"),
    Command("a group of a folder that is not there", COMPARE, words("--group", "a", "absent"), "got folders without a run (no metrics.jsonl and config.yaml): absent"),
    Command("a group without a name", COMPARE, words("--group"), "--group: got ''"),
    Command("a group without runs", COMPARE, words("--group", "latent"), "group.latent: got no run"),
    Command("a line that is no JSON", COMPARE, measured("step 0\n"), "line 1: not valid JSON"),
    Command("a line without its step", COMPARE, measured('{"gold": 1}\n'), "line 1: got"),
    Command("a line of a list", COMPARE, measured("[1]\n"), "line 1: got"),
    Command("a metric of text", COMPARE, measured('{"step": 1, "gold": "high"}\n'), "gold: got 'high'; expected a number"),
    Command("not UTF-8", COMPARE, measured(b"\xff\n"), "is not UTF-8"),
    Command("no evaluation", COMPARE, measured('{"step": 1, "loss": 1.0}\n'), "no evaluation of the base model"),
    Command("no evaluation in a group", COMPARE, measured('{"step": 1, "loss": 1.0}\n', copies=2), "no evaluation of the base model"),
    Command("evaluations missing", COMPARE, measured(ROWS, copies=2), "000000.json"),
    Command("evaluations of text", COMPARE, measured(ROWS, evaluation="gold", copies=2), "not valid JSON"),
    Command("evaluations without terms", COMPARE, measured(ROWS, evaluation="{}"), "no terms"),
    Command("evaluations of text scores", COMPARE, measured(ROWS, evaluation=EVALUATION.replace("1.0", '"a"'), copies=2), "expected a number"),
    Command("evaluations of too few", COMPARE, measured(ROWS, evaluation=EVALUATION.replace("[1.0]", "[]")), "one per prompt"),
]  # fmt: skip

SAVED = [
    Command("no multiple of 16", SAVINGS, words("--size=1000"), "size: got 1000 pixels"),
    Command("a batch of none", SAVINGS, words("--batch=0"), "batch: got 0; expected at least 1"),
    Command("nine levels", SAVINGS, words("--levels=9"), "levels: got 9"),
    Command("an unknown option", SAVINGS, words("--mesure"), "unknown option --mesure; did you mean '--measure'?"),
]  # fmt: skip

JUDGING = [
    Command("an unknown arm", ABLATE, words("--arms=[calibratd]"), "unknown 'calibratd'; did you mean 'calibrated'?"),
    Command("an arm twice", ABLATE, words("--arms=[fixed,fixed]"), "each once"),
    Command("no seeds", ABLATE, words("--seeds=[]"), "seeds: got []"),
    Command("a negative seed", ABLATE, words("--seeds=[-1]"), "seeds: got -1"),
    Command("no steps", ABLATE, words("--steps=0"), "steps: got 0"),
    Command("a level above 1", ABLATE, words("--sigmas=[0.4,1.5]"), "expected some of each, levels in [0, 1]"),
    Command("an empty ensemble", ABLATE, words("--ensembles=[[]]"), "expected some of each, levels in [0, 1]"),
    Command("no training settings", ABLATE, words("--training=absent.yaml"), "no settings file absent.yaml"),
    Command("training settings with a typing error", ABLATE, lambda w: ["--training", w.file("t.yaml", "lop: 1\n")], "unknown key lop"),
    Command("a model without pairs", ABLATE, words("--model=sd35"), "pass --pairs DIR and --judged"),
    Command("a near option (ablation)", ABLATE, words("--arm=[fixed]"), "--arm"),
    Command("a near model (ablation)", ABLATE, words("--model=shape"), "did you mean 'shapes'?"),
    Command("no levels", EVALUATE, words("--sigmas=[]"), "expected some of each, levels in [0, 1]"),
    Command("calibration elsewhere", EVALUATE, words("--calibrated_at=[0.15]"), "each must be one of sigmas"),
    Command("a seed of noise below 0", EVALUATE, words("--noise_seed=-1"), "noise_seed: got -1"),
    Command("an unknown likelihood", EVALUATE, words("--loss.likelihood=probit"), "loss.likelihood"),
    Command("no reward there", EVALUATE, words("--model=shapes", "--reward=absent"), "unknown reward 'absent'"),
    Command("no reward in that folder", EVALUATE, words("--model=shapes", "--reward=dinalrm=absent"), "no reward at 'absent'"),
    Command("an unknown protocol", EVALUATE, words("--judged={hpdv3: x}", "--protocol={hpdv3: poled}"), "did you mean 'pooled'?"),
    Command("a protocol of lists for pairs", EVALUATE, words("--judged={hpdv3: x}", "--protocol={hpdv3: hpsv2}"), "it needs lists"),
    Command("a protocol of no set", EVALUATE, words("--judged={hpdv3: x}", "--protocol={hpdv2: mps}"), "judged are hpdv3"),
    Command("a public set that is not there", EVALUATE, words("--judged={hpdv3: absent}", "--reward=oracle"), "To get it: hf download MizzenAI/HPDv3"),
    Command("a folder that is no public set", EVALUATE, lambda w: [f"--judged={{imagereward: {w.fresh()}}}", "--reward=oracle"], "holds no imagereward: expected test.json"),
    Command("a set too large for the hub", EVALUATE, words("--judged={hpdv3: hub}", "--reward=oracle"), "cannot be taken from the hub as it is"),
    Command("no sets", EVALUATE, words("--judged={}"), "judged: got no sets"),
    Command("a set that is no name", EVALUATE, words("--judged={a/b: x}"), "use a plain word"),
    Command("a size that patches do not divide", EVALUATE, words("--size=1000"), "size: got 1000; expected a multiple of 16"),
    Command("too few resamples", EVALUATE, words("--bootstrap=1"), "bootstrap: got 1; expected at least 100"),
    Command("an unknown way to fit", EVALUATE, words("--fit=pad"), "fit"),
    Command("nothing that was trained on", EVALUATE, lambda w: [f"--judged={{hpdv3: {w.file('test.json', '[]')}}}", "--reward=oracle", "--trained_on=absent.json"], "no training set absent.json"),
    Command("a model without pairs (evaluation)", EVALUATE, words("--model=sd35"), "pass --judged"),
    Command("judged is no mapping", EVALUATE, words("--judged=[a]"), "judged"),
]  # fmt: skip

METHODS = [
    Command("a group of one", GRPO, words("--grpo.group_size=1"), "grpo.group_size: got 1"),
    Command("one step of GRPO", GRPO, words("--grpo.num_steps=1"), "grpo.num_steps: got 1"),
    Command("no noise in GRPO", GRPO, words("--grpo.noise_level=0"), "grpo.noise_level: got 0"),
    Command("an unknown sampler", GRPO, words("--grpo.sampler=ode"), "grpo.sampler"),
    Command("an unknown window", GRPO, words("--grpo.window=some"), "grpo.window"),
    Command("a negative clip range", GRPO, words("--grpo.clip_range=-1e-4"), "grpo.clip_range: got -1e-4"),
    Command("a negative KL (GRPO)", GRPO, words("--grpo.kl_beta=-1"), "grpo.kl_beta: got -1"),
    Command("a level above 1 (GRPO)", GRPO, words("--grpo.reward_sigma=[1.2]"), "grpo.reward_sigma: got 1.2"),
    Command("an unknown reward (GRPO)", GRPO, words("--model=shapes", "--reward=pickscor"), "did you mean 'pickscore'?"),
    Command("half a sum", GRPO, words("--model=shapes", "--reward=dinalrm + "), "expected the name of a reward"),
    Command("a weight without a reward", GRPO, words("--model=shapes", "--reward=0.2 pixel"), "expected *"),
    Command("a weight of 0", GRPO, words("--model=shapes", "--reward=0*pixel"), "expected a finite one other than 0"),
    Command("a part twice", GRPO, words("--model=shapes", "--reward=pixel + pixel"), "stands twice"),
    Command("a source of nothing", GRPO, words("--model=shapes", "--reward=pixel="), "got nothing after pixel="),
    Command("an unknown gold", GRPO, words("--model=shapes", "--gold=orcle"), "did you mean 'oracle'?"),
    Command("a reward without gradient for ReFL", REFL, words("--model=shapes", "--reward=oracle"), "has no gradient"),
    Command("an unknown variant", REFL, words("--refl.variant=drafts"), "refl.variant"),
    Command("an anchor every 0 updates", REFL, words("--anchor.reward=pixel", "--anchor.every=0"), "anchor.every: got 0"),
    Command("an unknown tracker", REFL, words("--tracker=mlflow"), "tracker"),
    Command("one candidate", LPO, words("--lpo.candidates=1"), "lpo.candidates: got 1"),
    Command("a threshold of 1", LPO, words("--lpo.threshold=[0.5,1.0]"), "lpo.threshold"),
    Command("no noise in LPO", LPO, words("--lpo.noise_level=0"), "lpo.noise_level: got 0"),
    Command("levels upside down", NFT, words("--nft.earliest=0.8", "--nft.latest=0.2"), "nft.earliest: got 0.8"),
    Command("a group of one (NFT)", NFT, words("--nft.group_size=1"), "nft.group_size: got 1"),
    Command("beta 0", DPO, words("--dpo.beta=0"), "dpo.beta: got 0"),
    Command("an unknown mode", DPO, words("--dpo.mode=sideways"), "dpo.mode"),
    Command("pairs online", DPO, words("--pairs=pairs"), "pairs: got pairs"),
    Command("offline without pairs", DPO, words("--dpo.mode=offline"), "--pairs"),
    Command("one candidate to mine from", MINE, words("--mine.candidates=1"), "mine.candidates: got 1"),
    Command("a negative gap", MINE, words("--mine.min_gap=-1"), "mine.min_gap: got -1"),
    Command("no prompts to mine", MINE, words("--max_prompts=0"), "max_prompts: got 0"),
    Command("another recipe's section", MINE, words("--grpo.group_size=4"), "unknown option --grpo.group_size"),
]  # fmt: skip


def preparing(content: bytes | str, *more: str, name: str = "pairs.jsonl") -> Callable[[World], Sequence[object]]:
    """A preparation, on the tiny pipeline, of a file of this content."""
    return lambda world: [
        "--source", world.file(name, content), "--model", world_of(world), "--device=cpu", "--workers=0",
        "--output_dir", world.fresh() / "out", *more,
    ]  # fmt: skip


PREPARING = [
    Command("no source", PREPARE, words(), "source: got nothing"),
    Command("a source that is not there", PREPARE, words("--model=shapes", "--source=absent.json"), "no preference data absent.json"),
    Command("an unknown layout", PREPARE, words("--source=x", "--layout=hpdv4"), "layout"),
    Command("a near option (prepare)", PREPARE, words("--source=x", "--bucket=64x64"), "did you mean"),
    Command("buckets of words", PREPARE, words("--source=x", "--buckets=large"), "expected published"),
    Command("an odd bucket", PREPARE, words("--source=x", "--buckets=64x40"), "multiples of 16"),
    Command("a bucket twice", PREPARE, words("--source=x", "--buckets=64x64,64x64"), "each size once"),
    Command("a share of votes of 2", PREPARE, words("--source=x", "--filter.min_vote_share=2"), "filter.min_vote_share: got 2"),
    Command("no pairs of a prompt", PREPARE, words("--source=x", "--filter.max_pairs_per_prompt=0"), "max_pairs_per_prompt: got 0"),
    Command("an unknown way with ties", PREPARE, words("--source=x", "--filter.ties=halve"), "filter.ties"),
    Command("an unknown way with what is bad", PREPARE, words("--source=x", "--on_bad=ignore"), "on_bad"),
    Command("workers below 0", PREPARE, words("--source=x", "--workers=-1"), "workers: got -1"),
    Command("a shard of one picture", PREPARE, words("--source=x", "--shard_size=1"), "shard_size: got 1"),
    Command("records of something else", PREPARE, preparing('[{"a": 1}]', name="train.json"), "expected those of HPDv3"),
    Command("a train.json of an object", PREPARE, preparing("{}", name="train.json"), "expected a list of records"),
    Command("a train.json cut short", PREPARE, preparing('[{"path1":', name="train.json"), "not valid JSON"),
    Command("a line that is no JSON (prepare)", PREPARE, preparing("{"), "line 1: not valid JSON"),
    Command("a pair without a picture", PREPARE, preparing('{"prompt": "a", "chosen": "c.png"}'), "it lacks 'rejected'"),
    Command("a picture that is not there", PREPARE, preparing('{"prompt": "a", "chosen": "c.png", "rejected": "r.png"}'), "no image c.png"),
    Command("pairs without votes that mean anything", PREPARE, preparing('{"prompt": "a", "chosen": "c", "rejected": "r", "votes": "9"}'), "votes: got '9'"),
    Command("an empty source", PREPARE, preparing(""), "no pair is left of 0"),
    Command("a folder without parquet", PREPARE, lambda w: ["--source", w.fresh(), "--model", world_of(w), "--device=cpu"], "holds no parquet files"),
    Command("a batch of more than the pairs (loading)", LOADING, words("--pairs=2", "--batch_size=4"), "a batch of pairs"),
    Command("an odd height (loading)", LOADING, words("--height=100"), "multiple of 16"),
    Command("batches ahead below 0", TRAIN, words("--prefetch=-1"), "prefetch: got -1"),
]  # fmt: skip

GROUPS = {
    "preparing pairs": PREPARING,
    "methods and rewards by name": METHODS,
    "judging rewards": JUDGING,
    "options": OPTIONS,
    "settings files": FILES,
    "models, rewards and folders": PLACES,
    "what a run reads": RUNS,
    "compare_runs": COMPARED,
    "savings": SAVED,
}
