"""RemoteReward against a server in this process: equal scores, retries, refusals, pickling."""

import pickle

import pytest
import torch
from reward_server import free_port, running
from tiny_reward import encoded, make_inputs

from dinalrm_align.models.pipeline import load_vae
from dinalrm_align.models.specs import MODELS
from dinalrm_align.reward.callables import as_reward
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.reward.names import file_name, parse_reward, reward_sources
from dinalrm_align.reward.registry import load_reward, text_lengths
from dinalrm_align.train.files import InputError

PROMPTS = ["a small red circle on white", "a large blue square on gray"] * 4


@pytest.fixture(scope="module")
def reward(tiny_world):
    return LatentReward.from_pretrained(tiny_world / "dinalrm", pipeline=str(tiny_world / "pipeline"))


@pytest.fixture(scope="module")
def address(reward):
    bright = as_reward(lambda images, prompts: images.mean(dim=(1, 2, 3)), name="brightness")
    with running({"default": reward, "bright side": bright}, max_batch_size=3, max_wait_ms=1) as found:
        yield found


@pytest.fixture(scope="module")
def remote(address):
    return load_reward(address)


def latents(batch=8):
    return torch.randn(batch, 16, 16, 12, generator=torch.Generator().manual_seed(0))


NOISE = {
    "default": {},
    "seeds": {"seeds": [3, 1, 4, 1, 5, 9, 2, 6]},
    "sigma": {"sigma": 0.25},
    "sigma each": {"sigma": torch.linspace(0.1, 0.9, 8)},
    "ensemble": {"sigma": [0.2, 0.6]},
    "noise": {"noise": latents().flip(0)},
    "noise by level": {"sigma": (0.2, 0.6), "noise": torch.stack([latents().flip(0), latents().flip(2)])},
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_scores_are_those_of_the_reward_in_this_process(remote, reward, noise):
    """In three requests, as the server scores three samples at a time."""
    found = remote(latents(), PROMPTS, **noise)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reward(latents(), PROMPTS, **noise), atol=1e-5, rtol=0)


def test_a_generator_draws_here_as_it_does_for_a_local_reward(remote, reward):
    drawn = [of(latents(), PROMPTS, generator=torch.Generator().manual_seed(7)) for of in (remote, reward)]
    torch.testing.assert_close(*drawn, atol=1e-5, rtol=0)
    torch.testing.assert_close(remote.score_parts(latents(), PROMPTS)["reward"], remote(latents(), PROMPTS))


def test_embeddings_travel_if_the_prompts_are_unknown(remote, reward, tiny_pipeline):
    inputs = make_inputs(tiny_pipeline.transformer, tokens=32)
    conditions = encoded(inputs["prompt_embeds"], inputs["pooled_prompt_embeds"])
    scores = [of(inputs["latents"], conditions) for of in (remote, reward)]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)


def test_bfloat16_latents_travel_as_they_are(remote, reward):
    scores = [of(latents().bfloat16(), PROMPTS) for of in (remote, reward)]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)


def test_images_of_different_sizes_keep_their_order(remote, reward):
    big, small = torch.rand(3, 3, 32, 32), torch.rand(2, 3, 16, 32)
    images = [big[0], small[0], big[1], small[1], big[2]]
    found = remote.score_images(images, PROMPTS[:5], seeds=[0, 1, 2, 3, 4])
    wanted = [reward.score_images(images[i][None], PROMPTS[i : i + 1], seeds=[i]).item() for i in range(5)]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=0)
    drawn = [
        remote.score_images(images, PROMPTS[:5], generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2])


@pytest.mark.parametrize("noise", [NOISE[name] for name in ("sigma", "sigma each", "ensemble")])
def test_images_at_a_noise_level(remote, reward, address, noise):
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = remote.score_images(images, PROMPTS, **noise)
    torch.testing.assert_close(found, reward.score_images(images, PROMPTS, **noise), atol=1e-5, rtol=0)
    assert not torch.allclose(found, remote.score_images(images, PROMPTS), atol=1e-4)
    bright = load_reward(f"{address}#bright side")
    assert torch.equal(bright.score_images(images, PROMPTS, **noise), bright.score_images(images, PROMPTS))
    with pytest.raises(TypeError, match="noise"):
        remote.score_images(images, PROMPTS, noise=latents())


def test_rewards_by_name_and_in_sums(address):
    images = torch.rand(2, 3, 16, 16)
    bright = load_reward(f"{address}#bright side")
    torch.testing.assert_close(bright.score_images(images, PROMPTS[:2]), images.mean(dim=(1, 2, 3)))
    assert not bright.reads_noise
    both = load_reward(f'0.5*remote="{address}#bright side" - {address}')
    parts = [load_reward(address).score_images(images, PROMPTS[:2]), bright.score_images(images, PROMPTS[:2])]
    torch.testing.assert_close(both.score_images(images, PROMPTS[:2]), 0.5 * parts[1] - parts[0])
    with pytest.raises(ValueError, match="got the name 'bright', .*; did you mean 'bright side'. it serves default"):
        load_reward(f"{address}#bright")


def test_it_stands_for_the_served_reward(remote, reward, address):
    assert remote.fingerprint() == reward.fingerprint()
    assert (remote.differentiable, remote.reads_noise, remote.wants_groups) == (False, True, False)
    assert list(remote.sigmas) == list(reward.sigmas)
    assert not remote.text_lengths and not remote.noise_parts and remote.weights == {"reward": 1.0}
    assert text_lengths(address, MODELS["shapes"]) == set()
    again = pickle.loads(pickle.dumps(remote))
    assert torch.equal(again(latents(1), PROMPTS[:1]), remote(latents(1), PROMPTS[:1]))


def test_no_gradient(remote):
    with pytest.raises(ValueError, match="default is not differentiable"):
        remote(latents().requires_grad_(), PROMPTS)
    with pytest.raises(ValueError, match="gives no gradient"):
        remote.score_images(torch.rand(1, 3, 16, 16), PROMPTS[:1], differentiable=True)
    assert not parse_reward("http://127.0.0.1:1")[0].differentiable


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"latents": latents() * float("nan")}, "HTTP 400.*latents: .* are NaN or infinite"),
        ({"latents": torch.randn(8, 5, 16, 12)}, "HTTP 400.*got 5 channels"),
        ({"prompts": PROMPTS[:3]}, "prompts: got 3 for 8 samples"),
        ({"sigma": 1.5}, "sigma: got 1.5, outside"),
        ({"seeds": [1]}, "seeds: got 1 for 8 samples"),
    ],
)
def test_what_a_reward_refuses_is_refused_here_and_not_asked_again(remote, wrong, message):
    given = {"latents": latents(), "prompts": PROMPTS} | wrong
    with pytest.raises(ValueError, match=message):
        remote(given.pop("latents"), given.pop("prompts"), **given)


def test_a_server_that_is_away_is_waited_for(reward, monkeypatch):
    """Three attempts find no server; the reward comes back while the client pauses."""
    port, pauses, context = free_port(), [], []
    with running({"default": reward}, port=port) as address:
        remote = load_reward(address)

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            context.append(running({"default": reward}, port=port))
            context[0].__enter__()

    monkeypatch.setattr("dinalrm_align.reward.http.time.sleep", pause)
    found = remote(latents(1), PROMPTS[:1])
    context[0].__exit__(None, None, None)
    torch.testing.assert_close(found, reward(latents(1), PROMPTS[:1]), atol=1e-5, rtol=0)
    assert pauses[:3] == [1, 2, 4]


def test_no_server_is_an_error_in_the_end():
    with pytest.raises(ConnectionError, match=r"/v1/rewards: no answer in 2 attempts.*is the server up"):
        load_reward(f"http://127.0.0.1:{free_port()}", options={"remote": {"attempts": 2, "pause": 0}})


def test_a_server_with_another_reward_stops_the_run(reward):
    port = free_port()
    with running({"default": reward}, port=port) as address:
        remote = load_reward(address, options={"remote": {"attempts": 2, "pause": 0}})
    other = as_reward(lambda latents, prompts: latents.mean(dim=(1, 2, 3)), name="mean")
    with running({"default": other}, port=port), pytest.raises(InputError, match="another reward .* expected"):
        remote(latents(1), PROMPTS[:1])


def test_samples_over_the_limit_of_the_server_are_named_before_they_travel(reward):
    with running({"default": reward}, max_body_mb=1) as address:
        remote = load_reward(address, options={"remote": {"attempts": 1}})
        images = torch.rand(2, 3, 320, 320)  # 1.2 MB each
        with pytest.raises(ValueError, match=r"bytes of 1 samples.*at most 1048576: .*--max_body_mb"):
            remote.score_images(images, PROMPTS[:2])
        remote.wants_groups = True
        with pytest.raises(ValueError, match=r"bytes of 2 samples.*--max_body_mb"):
            remote.score_images(images[:, :, :192], PROMPTS[:2])


def test_a_server_that_decodes_with_another_vae_has_another_reward(tiny_world):
    vae, port = load_vae(tiny_world / "pipeline", device="cpu"), free_port()
    bright = as_reward(lambda images, prompts: images.mean(dim=(1, 2, 3)), name="brightness", vae=vae)
    with running({"default": bright}, port=port) as address:
        remote = load_reward(address, options={"remote": {"attempts": 2, "pause": 0}})
        assert torch.isfinite(remote(latents(1), PROMPTS[:1])).all()
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.5)
    with running({"default": bright}, port=port), pytest.raises(InputError, match="another reward"):
        remote(latents(1), PROMPTS[:1])


def test_the_token_is_sent_and_not_pickled(reward, monkeypatch):
    secret = "0123456789abcdef"
    with running({"default": reward}, token=secret) as address:
        with pytest.raises(ValueError, match="refuses the request .HTTP 401"):
            load_reward(address)
        remote = load_reward(address, options={"remote": {"api_key": secret}})
        assert secret not in repr(remote.server) and secret.encode() not in pickle.dumps(remote)
        monkeypatch.setenv("DINALRM_TOKEN", secret)
        again = pickle.loads(pickle.dumps(remote))
        assert torch.equal(again(latents(1), PROMPTS[:1]), remote(latents(1), PROMPTS[:1]))


@pytest.mark.parametrize("url", ["remote", "remote=127.0.0.1:80", "remote=ftp://host", "http://user:password@host:80"])
def test_what_is_no_address(url):
    with pytest.raises(ValueError, match="endpoint: got") as caught:
        load_reward(url)
    assert "user:password" not in str(caught.value)


def test_names_of_addresses():
    terms = parse_reward("http://a:1#x + 0.5*https://b:2")
    assert [(term.name, term.weight, term.source) for term in terms] == [
        ("remote", 1, "http://a:1#x"),
        ("remote", 0.5, "https://b:2"),
    ]
    assert file_name("http://a:1#x") == "a_1_x"
    assert reward_sources("http://a:1#x", MODELS["shapes"]) == {("http://a:1#x", "")}
