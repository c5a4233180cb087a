"""Python callables as rewards: what they are given, and what is refused."""

import sys

import pytest
import torch
from tiny_clip import tiny_vae
from torch import nn

from dinalrm_align.models.pipeline import decode_latents
from dinalrm_align.reward.callables import ImageFunction, LatentFunction, as_reward, import_callable
from dinalrm_align.reward.combine import RewardSum
from dinalrm_align.reward.registry import load_image_scorer, load_reward

PROMPTS = ["a", "bcd"]


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


def latents(seed=0):
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def energy(latents, sigma, *, prompts):
    assert prompts == PROMPTS
    return latents.square().mean((1, 2, 3)) * (1 if sigma is None else sigma)


class Brightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, prompts):
        return self.gain * images.mean((1, 2, 3))


def test_images_are_decoded_and_gradients_reach_the_latents(vae):
    reward, z = as_reward(redness, vae=vae), latents().requires_grad_()
    score = reward(z, prompts=PROMPTS, sigma=0.4)
    torch.testing.assert_close(score, redness(decode_latents(vae, z), PROMPTS))
    assert isinstance(reward, ImageFunction) and torch.autograd.grad(score.sum(), z)[0].abs().sum() > 0
    torch.testing.assert_close(reward.score_images(decode_latents(vae, latents()), PROMPTS), score.detach())


def test_latents_come_with_the_arguments_that_are_named():
    reward, z = as_reward(energy), latents().requires_grad_()
    score = reward(z, prompts=PROMPTS, sigma=0.5, generator=torch.Generator())
    torch.testing.assert_close(score, 0.5 * z.square().mean((1, 2, 3)))
    assert isinstance(reward, LatentFunction) and score.requires_grad
    assert reward(z, PROMPTS).shape == (2,)


def two_halves(images, prompts, parts=None):
    top, bottom = images[:, :, :4].mean((1, 2, 3)), images[:, :, 4:].mean((1, 2, 3))
    if parts is not None:
        parts |= {"top": top, "top/red": images[:, 0, :4].mean((1, 2)), "bottom": bottom}
    return top + bottom


def test_a_function_tells_what_its_scores_consist_of():
    """Also for images of several sizes, and as a gold reward that is a plain callable."""
    images, wide = torch.rand(2, 3, 8, 8), torch.rand(3, 8, 16)
    reward = as_reward(two_halves)
    scores, parts = reward.score_image_parts([images[0], wide, images[1]], ["a", "b", "c"])
    torch.testing.assert_close(scores, reward.score_images([images[0], wide, images[1]], ["a", "b", "c"]))
    assert list(parts) == ["top", "top/red", "bottom"] and parts["top"].dtype == torch.float32
    torch.testing.assert_close(parts["top"] + parts["bottom"], scores)
    torch.testing.assert_close(parts["top/red"][1], wide[0, :4].mean())
    for gold in (two_halves, reward):
        found, told = load_image_scorer(gold).with_parts(images, PROMPTS)
        torch.testing.assert_close(found, scores[[0, 2]])
        assert torch.equal(told["bottom"], parts["bottom"][[0, 2]])
    assert as_reward(redness).score_image_parts(images, PROMPTS)[1] == {}
    assert load_image_scorer(redness).with_parts(images, PROMPTS)[1] == {}


def test_a_sum_tells_its_parts_and_theirs_without_their_sources():
    parts = {"dinalrm=/home/me/a": redness, "dinalrm=/home/me/b": two_halves, "pickscore": redness}
    rewards = {name: as_reward(function) for name, function in parts.items()}
    images = torch.rand(2, 3, 8, 8)
    total = RewardSum(rewards, dict(zip(parts, (1.0, 0.5, -2.0))))
    scores, found = total.score_image_parts(images, PROMPTS)
    assert list(found) == ["dinalrm1", "dinalrm2", "dinalrm2/top", "dinalrm2/top/red", "dinalrm2/bottom", "pickscore"]
    torch.testing.assert_close(scores, total.score_images(images, PROMPTS))
    torch.testing.assert_close(scores, found["dinalrm1"] + 0.5 * found["dinalrm2"] - 2 * found["pickscore"])


@pytest.mark.parametrize("value", [torch.tensor([1.0, float("nan")]), torch.ones(3), 1.0])
def test_a_part_that_is_not_one_number_per_image_is_named(value):
    def odd(images, prompts, parts=None):
        parts["odd"] = value
        return images.mean((1, 2, 3))

    with pytest.raises((TypeError, ValueError), match="odd: odd"):
        as_reward(odd, name="odd").score_image_parts(torch.rand(2, 3, 8, 8), PROMPTS)


def test_a_module_is_frozen_and_read_by_its_forward(vae):
    module = Brightness().train()
    reward, z = as_reward(module, vae=vae), latents().requires_grad_()
    reward(z, prompts=PROMPTS).sum().backward()
    assert z.grad.abs().sum() > 0 and module.gain.grad is None and not module.training
    assert reward.device == module.gain.device


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (lambda x, prompts: x, TypeError, r"got the arguments \(x, prompts\); expected the first to be named images"),
        (lambda: 0, TypeError, r"got the arguments \(\)"),
        (lambda *args: 0, TypeError, r"got the arguments \(\)"),
        (Brightness, TypeError, "got the class Brightness"),
        (3, TypeError, "got int 3; expected a function"),
    ],
)
def test_what_cannot_be_a_reward(function, kind, message):
    with pytest.raises(kind, match=message):
        as_reward(function)


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (lambda latents: 1.0, TypeError, r"returned float; expected a tensor \(2,\)"),
        (lambda latents: latents.sum(), ValueError, r"returned shape \(\); expected \(2,\)"),
        (lambda latents: latents.mean((2, 3)), ValueError, r"returned shape \(2, 16\)"),
        (lambda latents: latents.detach().mean((1, 2, 3)), ValueError, "is not differentiable"),
        (lambda latents: latents.mean((1, 2, 3)) / 0, ValueError, "NaN or infinite"),
        (lambda images, prompts: images.detach().mean((1, 2, 3)), ValueError, "is not differentiable.*GRPO|rank"),
    ],
)
def test_what_a_reward_must_not_return(vae, function, kind, message):
    with pytest.raises(kind, match=message):
        as_reward(function, vae=vae, name="mine")(latents().requires_grad_(), prompts=PROMPTS)


def test_a_known_lack_of_gradient_is_said_before_the_decode(vae):
    reward = as_reward(lambda images, prompts: pytest.fail("was called"), vae=vae, differentiable=False)
    with pytest.raises(ValueError, match="not differentiable"):
        reward(latents().requires_grad_(), prompts=PROMPTS)


def test_dotted_paths(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "class Nested:\n    @staticmethod\n    def score(images, prompts): return images\n"
        "def my_reward(images, prompts): return images\nnumber = 3\n"
    )
    (tmp_path / "needs_more.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_callable("my_rewards:my_reward") is sys.modules["my_rewards"].my_reward
    assert import_callable("my_rewards:Nested.score") is sys.modules["my_rewards"].Nested.score
    with pytest.raises(ValueError, match="my_rewards has no 'my_rewrad'; did you mean 'my_reward'"):
        import_callable("my_rewards:my_rewrad")
    with pytest.raises(TypeError, match="got int 3; expected a function"):
        import_callable("my_rewards:number")
    with pytest.raises(ImportError, match="there is no module 'a_module_that_nobody_has'; .*PYTHONPATH"):
        import_callable("a_module_that_nobody_has:score")
    with pytest.raises(ImportError, match="there is no module 'my_rewards.inner'"):
        import_callable("my_rewards.inner:score")
    with pytest.raises(ImportError, match="needs_more needs the package 'a_package_that_nobody_has'"):
        import_callable("needs_more:score")


def test_names_stand_for_functions_that_are_given(vae):
    functions = {
        "mine:light": lambda images, prompts: images.mean(dim=(1, 2, 3)),
        "mine:size": lambda latents: latents.sum((1, 2, 3)),
    }
    reward = load_reward("2*mine:light - mine:size", functions=functions, vae=vae)
    x = latents()
    expected = 2 * decode_latents(vae, x).mean(dim=(1, 2, 3)) - x.sum((1, 2, 3))
    torch.testing.assert_close(reward(x, PROMPTS), expected)
    assert [part.name for part in reward.named_parts.values()] == [*functions]
    again = load_reward(
        "2*mine:light - mine:size", functions={**functions, "mine:size": lambda latents: latents}, vae=vae
    )
    assert again.fingerprint() == reward.fingerprint()  # by name: a resumed run may have a function at another address
