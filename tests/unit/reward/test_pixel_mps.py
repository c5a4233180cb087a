"""MPS from a pickled module of its own classes, which are nowhere to be imported: the arithmetic written out token by
token and head by head, and files that are something else.
"""

import os
import pickle
import sys
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from bomb import Bomb
from tiny_clip import LENGTH, SIZE, drop, smooth_images, tiny_clip_h, tiny_vae, write_processor
from torch import nn

from dinalrm_align.models.weights import read_module_tensors
from dinalrm_align.reward.pixel.mps import CONDITION, CrossBlock, MPSReward, convert_mps, main, rotate

PROMPTS = ["a red circle", "blue square"]
CONDITIONS = "red square"
WIDTH, HEADS, HEAD, INNER = 24, 2, 8, 96


def foreign_module():
    """A module `trainer.models.clip_model` with the classes of MPS's file, by the names that the file gives them."""
    module = types.ModuleType("trainer.models.clip_model")

    def new(name):
        kind = type(name, (nn.Module,), {"__module__": module.__name__, "__qualname__": name})
        setattr(module, name, kind)
        return kind

    return module, [new(name) for name in ("LayerNorm", "Residual", "RotaryEmbedding", "SwiGLU", "Part", "CLIPModel")]


def tiny_mps(clip, depth=2, seed=5):
    """MPS as its file has it: norms with a buffer for bias, residual wrappers `fn`, rotary rates as a buffer."""
    torch.manual_seed(seed)
    module, (norm_kind, residual, rotary, gate, part, whole) = foreign_module()

    def norm():
        layer = norm_kind()
        layer.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        layer.register_buffer("bias", torch.zeros(WIDTH))
        return layer

    def linear(*shape):
        layer = nn.Linear(*shape, bias=False)
        layer.weight.data.mul_(3)
        return layer

    def wrapped(fn):
        layer = residual()
        layer.fn = fn
        return layer

    model = whole()
    model.model, model.cross_model = clip, part()
    model.cross_model.layers = nn.ModuleList()
    for _ in range(depth):
        cross, own = part(), part()
        cross.norm, cross.context_norm = norm(), nn.Identity()
        cross.to_q, cross.to_kv = linear(WIDTH, HEADS * HEAD), linear(WIDTH, 2 * HEAD)
        cross.to_out = linear(HEADS * HEAD, WIDTH)
        cross.ff = nn.Sequential(linear(WIDTH, 2 * INNER), gate(), linear(INNER, WIDTH))
        own.norm, own.rotary_emb = norm(), rotary()
        own.rotary_emb.register_buffer("inv_freq", torch.ones(HEAD // 2))
        own.register_buffer("pos_emb", torch.zeros(17, HEAD), persistent=False)
        own.fused_attn_ff_proj = linear(WIDTH, HEADS * HEAD + 2 * HEAD + 2 * INNER)
        own.attn_out = linear(HEADS * HEAD, WIDTH)
        own.ff_out = nn.Sequential(gate(), linear(INNER, WIDTH))
        model.cross_model.layers.append(nn.ModuleList([wrapped(cross), wrapped(own)]))
    return module, model


def save_with_foreign_classes(module, content, path):
    names = ["trainer", "trainer.models", module.__name__]
    sys.modules.update(zip(names, [types.ModuleType(names[0]), types.ModuleType(names[1]), module], strict=True))
    try:
        torch.save(content, path)
    finally:
        for name in names:
            del sys.modules[name]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with a processor and MPS_overall_checkpoint.pth, the tensors in that file, and its CLIPModel."""
    folder = tmp_path_factory.mktemp("mps")
    tokenizer = write_processor(folder / "processor")
    clip = tiny_clip_h(tokenizer, seed=2)
    module, model = tiny_mps(clip)
    save_with_foreign_classes(module, model, folder / "MPS_overall_checkpoint.pth")
    return folder, model.state_dict(), clip, tokenizer


def load(world, **options):
    settings = dict(processor=str(world[0] / "processor"), condition=CONDITIONS, **options)
    return MPSReward.from_pretrained(world[0], **settings)


@pytest.fixture(scope="module")
def reward(world):
    return load(world, vae=tiny_vae())


def swiglu(x):
    half = x.shape[-1] // 2
    return x[..., :half] * x[..., half:] * torch.sigmoid(x[..., half:])


def turned(x):
    """Rotary positions as rotations of the plane (channel i, channel i + d/2) of the token at position n."""
    count, width = x.shape
    out = torch.empty_like(x)
    for position in range(count):
        for channel in range(width // 2):
            angle = torch.tensor(position * 10000 ** (-2 * channel / width))
            plane = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
            out[position, [channel, channel + width // 2]] = plane @ x[position, [channel, channel + width // 2]]
    return out


def heads_attend(query, key, value, keep=None):
    """Head after head, query after query; keep: which keys."""
    rows = []
    for row in query.split(HEAD, dim=-1):
        weight = (row @ key.T / HEAD**0.5).exp()
        if keep is not None:
            weight = weight * keep
        rows.append(weight / weight.sum(-1, keepdim=True) @ value)
    return torch.cat(rows, dim=-1)


def score_by_hand(tensors, clip, tokenizer, pixel_values, prompt):
    """The score of one image and prompt. Words are read where their relevance is above 0.3 of the largest."""

    def ids(text):
        return tokenizer([text], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids

    text = clip.text_model(input_ids=ids(prompt))
    tokens, end = clip.text_projection(text.last_hidden_state[0]), clip.text_projection(text.pooler_output[0])
    asked = clip.text_projection(clip.text_model(input_ids=ids(CONDITIONS)).last_hidden_state[0])
    relevance = torch.stack([max(token @ word for word in asked) for token in tokens])
    keep = (relevance / relevance.max() > 0.3).float()
    x = clip.visual_projection(clip.vision_model(pixel_values=pixel_values).last_hidden_state[0])
    for index in range(2):

        def weight(name, side, index=index):
            return tensors[f"cross_model.layers.{index}.{side}.fn.{name}.weight"]

        normed = F.layer_norm(x, (WIDTH,), weight("norm", 0))
        key, value = (tokens @ weight("to_kv", 0).T).split(HEAD, dim=-1)
        attended = heads_attend(normed @ weight("to_q", 0).T, key, value, keep)
        x = x + attended @ weight("to_out", 0).T + swiglu(normed @ weight("ff.0", 0).T) @ weight("ff.2", 0).T
        fused = F.layer_norm(x, (WIDTH,), weight("norm", 1)) @ weight("fused_attn_ff_proj", 1).T
        query, key, value, up = fused.split((HEADS * HEAD, HEAD, HEAD, 2 * INNER), dim=-1)
        query = torch.cat([turned(row) for row in query.split(HEAD, dim=-1)], dim=-1)
        attended = heads_attend(query, turned(key), value)
        x = x + attended @ weight("attn_out", 1).T + swiglu(up) @ weight("ff_out.1", 1).T
    return clip.logit_scale.exp() * F.cosine_similarity(x[0], end, dim=0), keep


def test_score_is_the_arithmetic_written_out(world, reward):
    _, tensors, clip, tokenizer = world
    images = smooth_images(2, SIZE, SIZE)
    by_hand = [
        score_by_hand(tensors, clip, tokenizer, reward.preprocess(image[None]), prompt)
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    want, kept = (torch.stack(parts) for parts in zip(*by_hand, strict=True))
    assert 0 < kept.mean() < 1, "the case must have words that are read and words that are not"
    torch.testing.assert_close(reward.score_images(images, PROMPTS), want, atol=1e-4, rtol=1e-4)


def test_a_prompt_scores_the_same_beside_any_other(reward):
    """Relevance is divided by the prompt's own maximum; upstream divides by the batch's, and is fed one at a time."""
    images = smooth_images(2, SIZE, SIZE, seed=3)
    both = reward.score_images(images, PROMPTS)
    alone = [reward.score_images(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone))


def test_the_condition_chooses_what_is_scored(world, reward):
    images = smooth_images(2, SIZE, SIZE)
    other = MPSReward(reward.clip, reward.blocks, reward.tokenizer, reward.preprocess, condition="blue circle blue")
    assert not torch.allclose(other.score_images(images, PROMPTS), reward.score_images(images, PROMPTS))
    words = CONDITION.rstrip(".").split(", ")
    assert len(words) == len(set(words)) == 22


def test_converted_file_scores_the_same(world, reward, tmp_path):
    convert_mps(world[0] / "MPS_overall_checkpoint.pth", tmp_path / "mps.safetensors")
    converted = MPSReward.from_pretrained(
        tmp_path / "mps.safetensors", processor=str(world[0] / "processor"), condition=CONDITIONS
    )
    images = smooth_images(2, SIZE, SIZE)
    assert torch.equal(converted.score_images(images, PROMPTS), reward.score_images(images, PROMPTS))


def test_the_converter_is_a_command(world, tmp_path, capsys):
    target = tmp_path / "mps.safetensors"
    main([str(world[0] / "MPS_overall_checkpoint.pth"), str(target)])
    assert target.is_file() and f"--reward mps={target}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "absent.pth"), str(target)])
    assert stopped.value.code == 2 and "absent.pth" in capsys.readouterr().err


def test_tensors_are_those_of_the_state_dict(world):
    """Parameters and persistent buffers of every foreign class, and nothing of pos_emb, which is not persistent."""
    folder, tensors, _, _ = world
    got = read_module_tensors(folder / "MPS_overall_checkpoint.pth")
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)
    assert "trainer" not in sys.modules


def test_gradient_agrees_with_finite_differences(world):
    """Along the gradient, in float64: slope against central difference, 1%."""
    reward = load(world, vae=tiny_vae().to(torch.float64), dtype=torch.float64)
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    score = reward(latents, prompts=PROMPTS[:1])
    assert score.shape == (1,) and score.dtype == torch.float32
    (gradient,) = torch.autograd.grad(score.sum(), latents)
    step = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        rise = reward(latents + step, prompts=PROMPTS[:1]) - reward(latents - step, prompts=PROMPTS[:1])
    assert rise.item() / 0.04 == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_each_prompt_is_encoded_once_and_few_are_kept(world, monkeypatch):
    monkeypatch.setattr("dinalrm_align.reward.pixel.mps.MAX_CACHED", 1)
    reward, asked = load(world), []
    features = reward._text_features
    monkeypatch.setattr(reward, "_text_features", lambda texts: asked.append(list(texts)) or features(texts))
    images = smooth_images(3, SIZE, SIZE)
    first = reward.score_images(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert asked == [PROMPTS, [CONDITIONS]] and len(reward._text) == 1
    torch.testing.assert_close(first, reward.score_images(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0]]))


def test_rotation_keeps_lengths_and_position_zero():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x)[:, 0], x[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.visual_projection.weight"), "missing visual_projection.weight"),
        (drop("cross_model.layers.0.0.fn.to_q.weight"), "missing 0.query.weight"),
        (drop("cross_model.layers.1.1.fn.ff_out.1.weight"), "1 missing: 1.self_down.weight"),
        (lambda t: {**t, "cross_model.layers.0.0.fn.to_v.weight": torch.zeros(1)}, "1 unexpected: cross_model.*to_v"),
        (lambda t: {**t, "head.weight": torch.zeros(1)}, "1 unexpected: head.weight"),
        (
            lambda t: {**t, "cross_model.layers.1.0.fn.to_kv.weight": torch.zeros(4, 24)},
            r"1.key_value.weight \(4, ",
        ),
        (
            lambda t: {**t, "cross_model.layers.1.0.fn.to_kv.weight": torch.zeros(0, 24)},
            r"1.key_value.weight \(0, ",
        ),
        (lambda t: {k: v for k, v in t.items() if "layers.0" not in k or "model.text" in k}, "missing"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("cross_model")}, "missing 0.key_value"),
        (
            lambda t: {k: v for k, v in t.items() if not k.startswith("cross_model.layers.0")},
            "missing 0.key_value",
        ),
    ],
)
def test_wrong_weights_are_named(world, tmp_path, change, message):
    from safetensors.torch import save_file

    save_file(change(world[1]), tmp_path / "mps.safetensors")
    with pytest.raises(ValueError, match=message):
        MPSReward.from_pretrained(tmp_path / "mps.safetensors", processor=str(world[0] / "processor"))


def test_code_in_the_pickle_is_not_run(world, tmp_path):
    """A function that the file names becomes a stand-in that does nothing; os and sys are refused outright."""
    mark, path = tmp_path / "mark", tmp_path / "MPS_overall_checkpoint.pth"
    holder = nn.Linear(2, 2)
    holder.bomb = Bomb(open, str(mark), "w")
    torch.save(holder, path)
    assert sorted(read_module_tensors(path)) == ["bias", "weight"]
    assert not mark.exists()
    with pytest.raises(ValueError, match="missing"):
        MPSReward.from_pretrained(tmp_path, processor=str(world[0] / "processor"))
    holder.bomb = Bomb(os.mkdir, str(mark))
    torch.save(holder, path)
    with pytest.raises(ValueError, match="asks for more than tensors: .* posix.mkdir whose module posix is blocked"):
        read_module_tensors(path)
    assert not mark.exists()
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
        torch.load(path, weights_only=True)  # nothing stays allowed afterwards


def test_files_of_another_kind_are_named(tmp_path):
    path = tmp_path / "MPS_overall_checkpoint.pth"
    torch.save(OrderedDict(weight=torch.zeros(2)), path)
    with pytest.raises(ValueError, match=r"got a dict with the entries \['weight'\]; expected a pickled torch.nn.Mod"):
        read_module_tensors(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="does not hold a readable pickled module"):
        read_module_tensors(path)
    with pytest.raises(FileNotFoundError, match="no file other.pth in"):
        MPSReward.from_pretrained(tmp_path, file="other.pth")
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="does not hold an MPS: it has no cross_model"):
        convert_mps(path, tmp_path / "out.safetensors")


def test_the_released_sizes_come_to_the_published_number_of_weights():
    """Four blocks of width 1024 with 16 heads of 64 beside CLIP ViT-H/14's 986 million: 1.10 billion."""
    with torch.device("meta"):
        block = CrossBlock(width=1024, heads=16, head_width=64, inner=4096)
    assert 0.986e9 + 4 * sum(parameter.numel() for parameter in block.parameters()) == pytest.approx(1.10e9, rel=1e-2)
