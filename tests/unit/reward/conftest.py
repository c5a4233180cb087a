"""Fixtures of the reward tests."""

import pytest
from tiny_clip import tiny_vae


@pytest.fixture(scope="module")
def vae():
    """16 latent channels, 4 pixels per latent position; each module gets its own."""
    return tiny_vae()
