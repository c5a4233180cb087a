"""Image rewards in bfloat16 and in emulated TF32: scores and gradients stay near float32's."""

import runpy
from pathlib import Path

import pytest
import torch

from dinalrm_align.models.pipeline import encode_images, load_vae
from dinalrm_align.models.specs import MODELS
from dinalrm_align.reward.registry import load_reward

EVIDENCE = Path(__file__).parents[3] / "examples" / "evidence"
SPEC = MODELS["shapes"]


@pytest.fixture
def judges(monkeypatch):
    monkeypatch.syspath_prepend(EVIDENCE)
    return runpy.run_path(str(EVIDENCE / "measure_judges.py"))


def test_tf32_keeps_ten_bits_of_mantissa(judges):
    """Halves go to even: 1 + 2^-11 lies between 1 and 1 + 2^-10, 1 + 3 x 2^-11 between 1 + 2^-10 and 1 + 2^-9."""
    values = torch.tensor([1 + 2**-10, 1 + 2**-11, -1 - 3 * 2**-11, 0.0, 1e30])
    expected = torch.tensor([1 + 2**-10, 1.0, -1 - 2**-9, 0.0])
    rounded = judges["round_to_tf32"](values)
    assert torch.equal(rounded[:4], expected)
    assert abs(rounded[4] / 1e30 - 1) < 2**-11


def test_products_are_rounded_forward_and_backward(judges):
    """(1 + 2^-11) x (1 + 2^-10) is 1 + 2^-10 in TF32; the gradient to the first factor is the second."""
    x, weight = torch.tensor([[1 + 2**-11]], requires_grad=True), torch.tensor([[1 + 2**-10 + 2**-12]])
    with judges["tf32"](*judges["PRODUCTS"]) as mode:
        product = torch.nn.functional.linear(x, weight, torch.tensor([2**-20]))
        (gradient,) = torch.autograd.grad(product.sum(), x)
    assert product.item() == 1 + 2**-10 + 2**-20 and gradient.item() == 1 + 2**-10 and mode.rounded == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
def test_an_image_reward_gives_refl_nearly_the_gradients_of_float32(judges, dtype):
    """examples/results/judges.md has the errors of more images: 0.022 on average in bfloat16, 0.0005 in TF32."""
    images, captions = judges["heldout"](6)
    vae = load_vae(SPEC.pipeline, device="cpu")
    latents = encode_images(vae, images)
    exact = judges["score"](load_reward("pixel", spec=SPEC, vae=vae), latents, captions)
    if dtype == "tf32":
        with judges["tf32"](*judges["CONVOLUTIONS"], *judges["PRODUCTS"]):
            found = judges["score"](load_reward("pixel", spec=SPEC, vae=vae), latents, captions)
    else:
        reward = load_reward("pixel", spec=SPEC, vae=vae, options={"pixel": {"dtype": dtype}})
        assert {parameter.dtype for parameter in reward.parameters()} == {torch.bfloat16}
        found = judges["score"](reward, latents, captions)
    agreement = judges["compare"](found, exact)  # refuses gradients that are not finite
    assert not torch.equal(found.scores, exact.scores)
    assert agreement.score_mean < {"bfloat16": 0.03, "tf32": 0.001}[dtype]
    assert agreement.gradient_cosine > {"bfloat16": 0.999, "tf32": 0.9999}[dtype]
