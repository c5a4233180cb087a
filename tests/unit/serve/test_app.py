"""The server's addresses, limits, tokens and errors, and its protocols as other projects' clients speak them."""

import base64
import dataclasses
import io
import json
import math
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastapi.testclient import TestClient
from malformed_requests import DRM, compute, drm, own, requests
from PIL import Image
from reward_server import application, mean, running
from safetensors.torch import save

from dinalrm_align.models.specs import MODELS
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.callables import as_reward
from dinalrm_align.reward.combine import RewardSum
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.serve.app import create_app
from dinalrm_align.serve.config import ServeConfig
from dinalrm_align.serve.metrics import Metrics
from dinalrm_align.serve.pool import load_rewards
from dinalrm_align.train.files import parse_json

PROMPT = "a small red circle on white"


@pytest.fixture(scope="module")
def reward(tiny_world):
    return LatentReward.from_pretrained(tiny_world / "dinalrm", pipeline=str(tiny_world / "pipeline"))


@pytest.fixture(scope="module")
def client(reward):
    rewards = {"default": reward, "latents": as_reward(mean, name="mean")}
    with TestClient(application(rewards, max_body_mb=1, max_queue=16)) as client:
        yield client


def numbers(value):
    """All floating-point numbers of a JSON value."""
    if isinstance(value, dict | list):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in numbers(item)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("request_", requests(), ids=lambda request: request.name)
def test_a_malformed_request_gets_a_sentence_and_no_number(client, request_):
    answer = client.post(request_.path, content=request_.body, headers=request_.headers)
    assert answer.status_code == request_.status, answer.text
    assert answer.json().keys() == {"detail"} and not numbers(answer.json())
    assert all(word in answer.json()["detail"] for word in request_.names.split(" ")), answer.text


def test_the_well_formed_forms_of_these_requests_are_scored(client):
    answers = [client.post("/v1/score", content=own()), client.post("/v1/score", content=drm(), headers=DRM)]
    answers += [client.post("/compute", content=compute()), client.post("/v1/score?reward=latents", content=own())]
    assert [len(numbers(answer.json())) for answer in answers] == [1, 1, 1, 1]
    assert answers[1].json().keys() == {"protocol_version", "raw_scores"}


def test_text_length_is_that_of_the_settings(tiny_world):
    """`text_length` sets the length of embeddings for dinalrm, alone and in sums, and not for other rewards."""
    spec = dataclasses.replace(MODELS["sd35"], pipeline=str(tiny_world / "pipeline"))
    name, rest = f"dinalrm={tiny_world / 'dinalrm'}", torch.randn(1, 32)
    rewards = {"twice": f"2*{name}", "other": "reward_server:mean"}
    settings, metrics = ServeConfig(reward=name, rewards=rewards, devices=["cpu"], text_length=28), Metrics()
    with TestClient(create_app(load_rewards(settings, spec, metrics), settings, metrics)) as client:
        for tokens, status in ((32, 400), (44, 200)):
            embeds = torch.randn(1, tokens, 32)
            body = own(None, prompt_embeds=embeds, pooled_prompt_embeds=rest)
            answers = [client.post(f"/v1/score?reward={reward}", content=body) for reward in ("default", "twice")]
            answers.append(client.post("/v1/score", content=drm(prompt_embeds=embeds), headers=DRM))
            assert [answer.status_code for answer in answers] == [status] * 3, answers[0].text


class DrmClient:
    """Contract double of verl-omni's DRM client.

    Recorded from verl_omni/utils/reward_score/latent_http_scorer_client.py, commit a1139ba: one sample, safetensors
    with `u` float32 (1,) and `seeds` int64 (1,), the header, and the checks of the answer.
    """

    def __init__(self, server_url, noise_level=0.4, noise_seed=0):
        self.server_url, self.noise_level, self.noise_seed = server_url, noise_level, noise_seed

    def __call__(self, latents, prompt_embeds, pooled_prompt_embeds):
        tensors = {
            "latents": latents[None],
            "prompt_embeds": prompt_embeds[None],
            "pooled_prompt_embeds": pooled_prompt_embeds[None],
            "u": torch.tensor([self.noise_level], dtype=torch.float32),
        }
        if self.noise_seed is not None:
            tensors["seeds"] = torch.tensor([self.noise_seed], dtype=torch.int64)
        headers = {"content-type": "application/octet-stream", "x-drm-protocol-version": "1"}
        request = urllib.request.Request(self.server_url, save(tensors), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.status == 200
            result = json.loads(response.read())
        assert isinstance(result, dict) and result.get("protocol_version") == "1"
        (score,) = result.get("raw_scores")
        assert math.isfinite(float(score))
        return float(score)


@pytest.mark.parametrize("seed", [0, 5, None])
def test_concurrent_drm_clients_get_the_scores_of_samples_alone(reward, seed):
    """16 clients of one sample each are scored in batches of 8."""
    latents = torch.randn(16, 16, 16, 12, generator=torch.Generator().manual_seed(1))
    embeds, pooled = reward.encoder([PROMPT] * 16)
    with running({"default": reward}, max_wait_ms=200) as address, ThreadPoolExecutor(16) as pool:
        client = DrmClient(f"{address}/v1/score", noise_level=0.3, noise_seed=seed)
        found = list(pool.map(client, latents, embeds, pooled))
        text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    seeds = [seed or 0]
    wanted = [
        reward.raw(latents[i : i + 1], Conditions([""], embeds[i : i + 1], pooled[i : i + 1]), sigma=0.3, seeds=seeds)
        for i in range(16)
    ]
    torch.testing.assert_close(torch.tensor(found), torch.cat(wanted), atol=1e-5, rtol=0)
    batches = float(next(line.split()[1] for line in text.splitlines() if line.startswith("dinalrm_batch_size_count")))
    assert 2 <= batches < 16 and "\ndinalrm_batch_size_sum 16\n" in text
    assert 'dinalrm_requests_total{path="/v1/score",status="200"} 16\n' in text and "\ndinalrm_errors_total 0\n" in text


def flow_factory_body(images, prompts):
    """What Flow-Factory's RemoteRewardClient posts (src/flow_factory/rewards/my_reward_remote.py, commit a0b2bc5)."""
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    others = {"video": None, "condition_images": None, "condition_videos": None}
    return json.dumps({"prompt": prompts, "image": encoded, **others}).encode()


def test_flow_factory_images(client, reward):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), generator=generator, dtype=torch.uint8)
    images = [Image.fromarray(each.numpy()) for each in pixels]
    images[2] = images[2].resize((16, 32))
    answer = client.post("/compute", content=flow_factory_body(images, [PROMPT] * 3))
    wanted = torch.cat([reward.score_images(image, PROMPT) for image in images])
    torch.testing.assert_close(torch.tensor(answer.json()["rewards"]), wanted, atol=1e-5, rtol=0)
    assert client.get("/health").is_success and client.get("/healthz").json() == {"status": "ok"}


def test_a_bad_sample_does_not_spoil_its_neighbours(reward):
    """A callable refuses one sample of a batch; the others of the batch get their scores."""

    def refuse(latents, prompts):
        if "bad" in prompts:
            raise RuntimeError("device-side assert")
        return latents.mean(dim=(1, 2, 3))

    application_ = application({"default": as_reward(refuse, name="refuse")}, max_wait_ms=200, max_batch_size=4)
    with TestClient(application_) as client, ThreadPoolExecutor(4) as pool:
        bodies = [own([prompt], latents=torch.ones(1, 16, 4, 4)) for prompt in ("a", "bad", "c", "d")]
        answers = list(pool.map(lambda body: client.post("/v1/score", content=body), bodies))
    assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
    assert "RuntimeError: device-side assert" in answers[1].json()["detail"] and not numbers(answers[1].json())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_a_fault_inside(value):
    broken = as_reward(lambda latents, prompts: latents.mean(dim=(1, 2, 3)) * value, name="broken")
    with TestClient(application({"default": broken})) as client:
        answer = client.post("/v1/score", content=own())
    assert answer.status_code == 500 and not numbers(answer.json()) and "NaN or infinite" in answer.json()["detail"]


def test_no_tensor_is_a_fault_inside():
    with TestClient(application({"default": as_reward(lambda latents, prompts: 1.0, name="broken")})) as client:
        answer = client.post("/v1/score", content=own())
    assert answer.status_code == 500 and "'broken' returned float" in answer.json()["detail"]


def test_an_answer_that_a_reward_cannot_read_is_a_fault_inside():
    """A reward asks another server, whose answer is cut off."""

    def asks(latents, prompts):
        return parse_json('{"scores": [', "http://evaluator")

    with TestClient(application({"default": as_reward(asks, name="asks")})) as client:
        answer = client.post("/v1/score", content=own())
    assert answer.status_code == 500 and "http://evaluator" in answer.json()["detail"]


def upload(address, body, declared):
    """A connection with a request to score whose declared size may be larger than its body."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(f"POST /v1/score HTTP/1.1\r\nHost: {host}\r\nContent-Length: {declared}\r\n\r\n".encode() + body)
    return connection


def wait_for_metric(address, text):
    end = time.monotonic() + 10
    while text not in (found := urllib.request.urlopen(f"{address}/metrics").read().decode()):
        assert time.monotonic() < end, found
        time.sleep(0.01)


def test_a_stalled_upload_ends(monkeypatch):
    """It is answered with status 408 and its connection is closed, so the server can stop."""
    monkeypatch.setattr("dinalrm_align.serve.app.BODY_SECONDS", 0.2)
    with running({"default": as_reward(mean, name="mean")}) as address, upload(address, b"abc", 100) as connection:
        answer = b""
        while data := connection.recv(4096):
            answer += data
    assert answer.startswith(b"HTTP/1.1 408 ") and b"body: got 3 bytes in 0.2 s" in answer


def test_an_upload_that_its_client_breaks_off_is_no_fault(caplog):
    with running({"default": as_reward(mean, name="mean")}) as address:
        upload(address, b"abc", 100).close()
        wait_for_metric(address, 'path="/v1/score",status="499"} 1')
    assert "a request failed" not in caplog.text


def test_a_request_whose_client_has_gone_is_not_scored():
    entered, leave, scored = threading.Event(), threading.Event(), []

    def slow(latents, prompts):
        entered.set()
        assert leave.wait(20)
        scored.extend(prompts)
        return mean(latents, prompts)

    rewards = {"default": as_reward(slow, name="slow")}
    with running(rewards, max_batch_size=1, max_wait_ms=0) as address, ThreadPoolExecutor(1) as pool:
        first = pool.submit(urllib.request.urlopen, f"{address}/v1/score", own(["stays"]), 20)
        assert entered.wait(20)
        with upload(address, body := own(["goes"]), len(body)):
            wait_for_metric(address, "dinalrm_waiting 1")
        wait_for_metric(address, 'path="/v1/score",status="499"} 1')
        leave.set()
        assert json.loads(first.result(20).read())["scores"]
    assert scored == ["stays"]


def test_a_full_queue_says_when_to_come_back():
    entered, leave = threading.Event(), threading.Event()

    def slow(latents, prompts):
        entered.set()
        assert leave.wait(20)
        return latents.mean(dim=(1, 2, 3))

    rewards = {"default": as_reward(slow, name="slow")}
    with TestClient(application(rewards, max_batch_size=2, max_queue=2, max_wait_ms=0)) as client:
        body = own([PROMPT] * 2, latents=torch.ones(2, 16, 4, 4))
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(client.post, "/v1/score", content=body)
            assert entered.wait(20)
            second = pool.submit(client.post, "/v1/score", content=body)
            while "dinalrm_waiting 2" not in client.get("/metrics").text:
                pass
            third = client.post("/v1/score", content=body)
            leave.set()
            assert first.result(20).status_code == second.result(20).status_code == 200
    assert third.status_code == 429 and third.headers["retry-after"] == "1" and not numbers(third.json())
    assert "2 samples wait already" in third.json()["detail"]


SECRET = "correct horse battery".replace(" ", "-")
BASIC = base64.b64encode(f"any:{SECRET}".encode()).decode()


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Basic !!", 401),
        (f"Basic {SECRET}", 401),
        (f"Bearer {SECRET}", 200),
        (f"Basic {BASIC}", 200),
    ],
)
def test_a_token_is_needed_for_all_but_health(reward, header, status):
    headers = {} if header is None else {"authorization": header}
    with TestClient(application({"default": reward}, token=SECRET)) as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/metrics", "/v1/rewards"):
            assert client.get(path, headers=headers).status_code == status
        for path, body in (("/v1/score", own()), ("/compute", compute())):
            answer = client.post(path, content=body, headers=headers)
            assert answer.status_code == status and (status == 200) == bool(numbers(answer.json()))


def test_groups_are_scored_whole_and_alone():
    """A reward that compares the samples of a call gets the samples of one request, also above max_batch_size."""
    sizes = []

    def ranks(latents, prompts):
        sizes.append(len(latents))
        return latents.mean(dim=(1, 2, 3)).argsort().argsort().float()

    reward = as_reward(ranks, name="ranks")
    reward.wants_groups = True
    with TestClient(application({"default": reward}, max_batch_size=2, max_wait_ms=50)) as client:
        body = own([PROMPT] * 3, latents=torch.arange(3.0)[:, None, None, None].expand(3, 16, 4, 4).contiguous())
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/score", content=body), range(2)))
    assert [answer.json()["scores"] for answer in answers] == [[0.0, 1.0, 2.0]] * 2 and sizes == [3, 3]


def test_copies_share_the_work():
    """Two copies score two requests at the same time: each waits for the other."""
    barrier = threading.Barrier(2, timeout=20)

    def meet(latents, prompts):
        barrier.wait()
        return latents.mean(dim=(1, 2, 3))

    with TestClient(application({"default": as_reward(meet, name="meet")}, copies=2, max_batch_size=1)) as client:
        assert client.get("/v1/rewards").json()["rewards"]["default"]["devices"] == 2
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/score", content=own()), range(2)))
    assert [answer.status_code for answer in answers] == [200, 200]


def test_a_part_of_two_rewards_scores_for_one_at_a_time():
    """Two rewards, one of them a sum, share a part, whose scores are wrong while another thread scores."""
    busy, together = threading.Lock(), []

    def alone(latents, prompts):
        if not busy.acquire(blocking=False):
            together.append(prompts)
            return latents.mean(dim=(1, 2, 3))
        threading.Event().wait(0.2)
        busy.release()
        return latents.mean(dim=(1, 2, 3))

    part = as_reward(alone, name="alone")
    rewards = {"default": part, "sum": RewardSum({"alone": part, "mean": as_reward(mean)}, {"alone": 1, "mean": 2})}
    with TestClient(application(rewards, max_wait_ms=0)) as client:
        with ThreadPoolExecutor(2) as pool:
            paths = ["/v1/score", "/v1/score?reward=sum"]
            answers = list(pool.map(lambda path: client.post(path, content=own()), paths))
    assert [answer.status_code for answer in answers] == [200, 200] and not together


def test_the_end_finishes_what_was_accepted():
    entered, scored = threading.Event(), []

    def slow(latents, prompts):
        entered.set()
        threading.Event().wait(0.3)
        scored.append(len(latents))
        return latents.mean(dim=(1, 2, 3))

    with ThreadPoolExecutor(1) as pool:
        with running({"default": as_reward(slow, name="slow")}, max_wait_ms=0) as address:
            answer = pool.submit(urllib.request.urlopen, f"{address}/v1/score", own(), 20)
            assert entered.wait(20)  # the server stops now
        assert json.loads(answer.result(20).read())["scores"] and scored == [1]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/healthz", timeout=5)
