"""The reward head: shapes, what starts at zero, level and token order, squashing, sizes."""

import pytest
import torch

from dinalrm_align.reward.backbones import Taps
from dinalrm_align.reward.config import HeadConfig
from dinalrm_align.reward.head import RewardHead


def make_taps(batch=2, width=16, layers=2, seed=0, dtype=torch.float32, text_layers=None):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    visual = tuple(draw(batch, 6, width) for _ in range(layers))
    text_layers = layers if text_layers is None else text_layers
    return Taps(visual, tuple(draw(batch, 5, width) for _ in range(text_layers)), draw(batch, width))


def make_head(width_in=16, layers=2, temb_dim=None, seed=0, text_layers=None, **config):
    torch.manual_seed(seed)
    text_layers = layers if text_layers is None else text_layers
    head = RewardHead(HeadConfig(**config), width_in, layers, text_layers, temb_dim).eval()
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return head


@pytest.mark.parametrize("config", [{}, {"width": 32}, {"use_proj_in": True}, {"num_queries": 1, "num_attn_heads": 4}])
def test_one_float32_score_per_sample(config):
    score = make_head(**config)(make_taps())
    assert score.shape == (2,) and score.dtype == torch.float32 and bool(torch.isfinite(score).all())


def names(head):
    return set(head.state_dict())


OPTIONS = [{}, {"film": False}, {"value_gates": False}, {"film": False, "value_gates": False}]


@pytest.mark.parametrize("config", OPTIONS)
@pytest.mark.parametrize("text_layers", [0, 2])
@pytest.mark.parametrize("num_queries", [1, 4, 8])
def test_every_parameter_of_every_architecture_takes_part(config, text_layers, num_queries):
    """One level or two: a score per sample, a gradient for each parameter, another one for each sample's tokens."""
    head = make_head(text_layers=text_layers, num_queries=num_queries, **config)
    taps = make_taps(text_layers=text_layers)
    score = head([taps, make_taps(text_layers=text_layers, seed=1)])
    score.sum().backward()
    assert score.shape == (2,) and score.dtype == torch.float32 and score[0] != score[1]
    silent = {name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert not silent
    assert head.query_tokens.shape == (1, num_queries, 16)


def test_without_film_the_adapters_have_no_conditioning_to_read():
    head = make_head(film=False)
    assert names(make_head()) - names(head) == {name for name in names(make_head()) if "cond_mlp" in name} != set()
    taps = make_taps()
    assert torch.equal(head(taps), head(Taps(taps.visual, taps.text, taps.temb + 1)))
    assert not torch.equal(make_head()(taps), make_head()(Taps(taps.visual, taps.text, taps.temb + 1)))
    adapter = head.layer_adapters_visual[0]
    torch.testing.assert_close(adapter(taps.visual[0], taps.temb), adapter.proj(taps.visual[0] + adapter.layer_embed))


def test_without_value_gates_the_values_are_twice_those_of_fresh_gates():
    """Fresh gates are one half everywhere, so that the attention's sum (before its output layer) is half as large."""
    gated, plain = (RewardHead(HeadConfig(value_gates=on), 16, 1, 1).attn1 for on in (True, False))
    assert set(gated.state_dict()) - set(plain.state_dict()) == {k for k in gated.state_dict() if "gate_" in k} != set()
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if "gate_" not in k})
    gated.to_out[0].bias.data.zero_()
    plain.to_out[0].bias.data.zero_()
    taps = make_taps(layers=1)
    inputs = (torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)), taps.visual[0], taps.text[0])
    torch.testing.assert_close(plain(*inputs), 2 * gated(*inputs))


def test_image_taps_alone_leave_no_text_parameters_and_keep_the_image_gate():
    head = make_head(text_layers=0)
    gone = names(make_head()) - names(head)
    assert gone == {name for name in names(make_head()) if "text" in name or "norm_t" in name} != set()
    assert "attn1.gate_vis.0.weight" in names(head)
    assert "attn1.gate_vis.0.weight" not in names(make_head(text_layers=0, value_gates=False))


@pytest.mark.parametrize(("config", "present"), [({}, False), ({"width": 32}, True), ({"use_proj_in": True}, True)])
def test_proj_in_is_there_when_asked_for_or_needed(config, present):
    assert ("layer_adapters_visual.0.proj_in.weight" in make_head(**config).state_dict()) is present


def test_fresh_adapter_does_not_modulate():
    """gamma = beta = 0 at the start, so that the conditioning vector changes nothing: h = x + layer_embed."""
    adapter = RewardHead(HeadConfig(), 16, 1, 1).layer_adapters_visual[0]
    tokens = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    outputs = [adapter(tokens, temb) for temb in (torch.zeros(2, 16), torch.ones(2, 16))]
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], adapter.proj(tokens + adapter.layer_embed))


def test_fresh_gates_halve_the_values():
    attention = RewardHead(HeadConfig(), 16, 1, 1).attn1
    tokens = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.sigmoid(attention.gate_vis(tokens)), torch.full((2, 6, 1), 0.5))


def test_levels_are_one_sequence_of_tokens():
    """Attention does not know the order of tokens: levels may be swapped; the same level twice is that level once."""
    head, first, second = make_head(), make_taps(seed=0), make_taps(seed=1)
    torch.testing.assert_close(head([first, second]), head([second, first]))
    torch.testing.assert_close(head([first, first]), head(first))
    assert (head([first, second]) - head(first)).abs().max() > 1e-4


def test_each_level_is_adapted_with_its_own_conditioning():
    head, taps = make_head(), make_taps()
    other = Taps(taps.visual, taps.text, taps.temb + 1)
    assert (head([taps, other]) - head([taps, taps])).abs().max() > 1e-4


def test_samples_do_not_see_each_other():
    head, taps = make_head(), make_taps(batch=3)
    alone = Taps(tuple(v[1:2] for v in taps.visual), tuple(t[1:2] for t in taps.text), taps.temb[1:2])
    torch.testing.assert_close(head(taps)[1:2], head(alone))


def test_squashing_is_the_logistic_curve():
    """4 / (1 + exp(-(x - 0.1) / (|-0.3| + 1e-6))) - 2, within (-2, 2)."""
    plain, squashed = make_head(), make_head(use_logistic=True)
    squashed.load_state_dict(plain.state_dict() | {"eta3": torch.tensor(0.1), "eta4": torch.tensor(-0.3)})
    raw = plain(make_taps())
    expected = 4 / (1 + torch.exp(-(raw - 0.1) / (0.3 + 1e-6))) - 2
    torch.testing.assert_close(squashed(make_taps()), expected)
    squashed.head.bias.data += 1e4
    assert bool((squashed(make_taps()) == 2).all())


def test_half_precision_tokens_and_autocast_keep_the_score_float32():
    head = make_head()
    exact = head(make_taps())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = head(make_taps(dtype=torch.bfloat16))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.05)


def test_dropout_acts_in_training_only():
    head, taps = make_head(dropout=0.5), make_taps()
    assert torch.equal(head(taps), head(taps))
    head.train()
    torch.manual_seed(0)
    assert not torch.equal(head(taps), head(taps))


@pytest.mark.parametrize(("config", "message"), [
    ({"width": 20}, "head.width: got 20 with 8 attention heads"),
    ({"num_queries": 0}, "num_queries: got 0"),
    ({"num_attn_heads": 0, "width": 16}, "num_attn_heads: got 0"),
    ({"dropout": 1.0}, "dropout: got 1.0"),
])  # fmt: skip
def test_impossible_sizes_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**config)


def test_heads_must_divide_the_backbones_width():
    with pytest.raises(ValueError, match="num_attn_heads: got 8, which do not divide the width 12"):
        RewardHead(HeadConfig(), 12, 1, 1)
