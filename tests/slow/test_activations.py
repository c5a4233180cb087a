"""The predicted bytes of activations are those that are counted on networks of SD3.5 Medium's width."""

import dataclasses

import pytest

from dinalrm_align.align.activations import policy_bytes, reward_bytes
from dinalrm_align.align.savings.config import FULL, Case
from dinalrm_align.align.savings.cost import count


def test_activations_of_the_policy_are_as_predicted():
    layout = {**FULL.transformer, "num_layers": 8, "dual_attention_layers": (0, 1, 2, 3)}
    case = Case(work="policy_gradient", size=512, batch=2).kept
    counted = count(case, dataclasses.replace(FULL, transformer=layout)).activations
    predicted = policy_bytes(width=1536, blocks=8, second=4, image_tokens=1024, text_tokens=205, images=2, itemsize=2)
    assert predicted == pytest.approx(counted, rel=0.05)


def test_activations_of_a_latent_reward_are_as_predicted():
    counted = count(Case(work="gradient", size=512).kept, FULL).activations
    assert reward_bytes(width=1536, blocks=12, tokens=1229, images=1, itemsize=2) == pytest.approx(counted, rel=0.05)
