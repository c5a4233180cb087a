"""UnifiedReward against a small HTTP server in this process that answers as vLLM and SGLang do, well and badly."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from dinalrm_align.models.pipeline import decode_latents
from dinalrm_align.reward.pixel.unifiedreward import TEMPLATES, ChatEndpoint, Template, UnifiedReward
from dinalrm_align.reward.registry import load_reward
from dinalrm_align.train.files import InputError

PROMPTS = ["a red circle", "a {blue} square"]
ACS = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 3"
GOOD = "circle (object): 1\nred (attribute): 0\nFinal Score: 3.5"


class Server:
    """Answers every question by `answer(body) -> (status, text)`; keeps what was asked."""

    def __init__(self):
        self.asked, self.headers, self.now, self.most = [], [], 0, 0
        self.answer = lambda body: (200, completion(GOOD))
        lock, owner = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    owner.asked.append(body)
                    owner.headers.append((self.path, self.headers["Authorization"]))
                    owner.now += 1
                    owner.most = max(owner.most, owner.now)
                status, text = owner.answer(body)
                with lock:
                    owner.now -= 1
                data = text.encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client gave up
                    pass

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def completion(text):
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def make(server, **options):
    return UnifiedReward.from_pretrained(server.url, **({"timeout": 60.0, "pause": 0.0} | options))


def images(batch=2):
    return torch.rand(batch, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def asked_of(body):
    """The question and the image of one request."""
    image, text = body["messages"][0]["content"]
    data = image["image_url"]["url"].removeprefix("data:image/png;base64,")
    return text["text"], Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_good_answer_is_its_number(server):
    scores = make(server).score_images(images(), PROMPTS)
    assert scores.tolist() == [3.5, 3.5] and scores.dtype == torch.float32


def test_load_reward_knows_it_by_name(server):
    found = load_reward(f"unifiedreward={server.url}", options={"unifiedreward": {"api_key": "secret"}})
    assert not found.differentiable
    assert found.score_images(images(1), PROMPTS[:1]).tolist() == [3.5]
    assert server.headers == [("/v1/chat/completions", "Bearer secret")]


def test_each_image_is_asked_about_with_its_own_prompt_and_scores_keep_their_order(server):
    second_is_there = threading.Event()

    def answer(body):
        first = PROMPTS[0] in asked_of(body)[0]
        (second_is_there.wait if first else second_is_there.set)()  # the first is answered last
        return 200, completion(f"Final Score: {2 if first else 4}")

    server.answer = answer
    assert make(server, concurrency=2).score_images(images(), PROMPTS).tolist() == [2.0, 4.0]


def test_the_request_is_that_of_a_chat_completion_with_the_image_as_png(server):
    make(server, model="served", api_key="secret", side=None).score_images(images(1), PROMPTS[1:])
    (body,) = server.asked
    text, image = asked_of(body)
    assert server.headers == [("/v1/chat/completions", "Bearer secret")]
    assert body["model"] == "served" and body["temperature"] == 0 and len(body["messages"]) == 1
    assert text == TEMPLATES["point"].question.replace("{prompt}", PROMPTS[1])
    want = (images(1)[0] * 255).round().byte().permute(1, 2, 0)
    assert torch.equal(torch.tensor(list(image.tobytes())).view(32, 48, 3), want.long())


def test_images_are_sent_as_squares_of_512(server):
    make(server).score_images(images(1), PROMPTS[:1])
    assert asked_of(server.asked[0])[1].size == (512, 512)


def test_the_mean_of_three_axes(server):
    server.answer = lambda body: (
        200,
        completion(ACS),
    )
    assert make(server, template="acs").score_images(images(1), PROMPTS[:1]).tolist() == [3.5]


def test_a_question_of_ones_own(server, tmp_path):
    (tmp_path / "question.txt").write_text("How well does this show [{prompt}]?")
    make(server, question=tmp_path / "question.txt").score_images(images(1), PROMPTS[:1])
    assert asked_of(server.asked[0])[0] == "How well does this show [a red circle]?"


def test_as_many_questions_at_once_as_asked_for_and_no_more(server):
    pair = threading.Barrier(2)

    def answer(body):
        pair.wait(timeout=30)  # until a second question is there
        time.sleep(0.1)  # long enough for a third, were it asked
        return 200, completion(GOOD)

    server.answer = answer
    make(server, concurrency=2).score_images(images(6), PROMPTS * 3)
    assert len(server.asked) == 6 and server.most == 2


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 1", 1),
        ("**Final Score:** 4.25", 4.25),
        ("final score :\n5.", 5),
        ("Final Score (1-5): 2/5", 2),
        ("Final Score: 3 / 5", 3),
        ("Final Score: 3\n...\nFinal Score: 3.0", 3),
        ("**Final Score**: 4.0/5", 4),
        ("**Final Score**: **4.0**/5", 4),
        ("Final Score: **4**", 4),
        ("**Final Score: 4**", 4),
        ("### Final Score:\n\n**3.5**", 3.5),
        ("Final Score: 4.0 out of 5", 4),
        ("Final Score: 4 out of 5.0.", 4),
        ("Final Score: 4 (out of 5)", 4),
        ("Final Score: 3,5", 3.5),
        ("Final Score: 3,5/5,0", 3.5),
        ("Final Score: [4]", 4),
        ("Final Score: `4.5`", 4.5),
        ("__Final Score__: _2_", 2),
        ("| Final Score: | 4 |", 4),
        ("Final Score = 4", 4),
        ("Final Score： 4", 4),
        ("**Final Score (1-5)**: 4", 4),
        ("Final Score: $4$", 4),
        ('"Final Score": 4', 4),
        ('{"final_score": 4.5}', 4.5),
        ("| Final Score | 4.0 |", 4),
        ("|**Final Score**|**4.0**|", 4),
        ("### Final Score\n4.0", 4),
        ("Final Score (out of 5): 4", 4),
        ("Final Score (1 to 5): 4", 4),
        ("<b>Final Score:</b> 4", 4),
        ("Final Score: $\\boxed{4.5}$", 4.5),
        ("Final Score is **4**", 4),
        ("Final Score — 4.5", 4.5),
        ("**Final  Score**: +4 out of five", 4),
        ("Final Score: ４.５", 4.5),
        ("elements\\nFinal Score:\\u00a04".replace("\\u00a0", "\u00a0"), 4),
        ("Final Score: 4 / 5 stars\n- 2 objects", 4),
    ],
)
def test_numbers_are_read(text, score):
    assert TEMPLATES["point"].read(text) == score


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The image is good.",
        "Final Score: 3 to 4",
        "Final Score: 3.5 -> 4",
        "Final Score: 4 1/2",
        "Final Score: 4½",
        "Final Score: 4 of 10",
        "Final Score: good",
        "Final Score: 0",
        "Final Score: 5.5",
        "Final Score: -3",
        "Final Score: 45",
        "Final Score: 4/10",
        "Final Score: 4.5/10",
        "Final Score: 1-5",
        "Final Score: 3\nFinal Score: 4",
        "**Final Score**: **4**/10",
        "Final Score: 4 out of 10",
        "Final Score: 4,5 / 10",
        "Final Score: 80%",
        "Final Score: 4 %",
        "Final Score: 1.2.3",
        "Final Score: 5,01",
        "Final Score: **0**",
        "Final Score: -4/5",
        "Final Score: 4/50",
        "Final Score: 4/5.5",
        "Final Score: 4th of all",
        "Final Score: nan",
        "<b>Final Score</b>: good",
        "Score: 4",
    ],
)
def test_answers_without_one_number_are_refused(text):
    with pytest.raises(ValueError, match="expected one 'Final Score: x' with x from 1 to 5"):
        TEMPLATES["point"].read(text)


def test_each_axis_is_needed():
    with pytest.raises(ValueError, match="'Style Score: x'"):
        TEMPLATES["acs"].read("Alignment Score (1-5): 4\nCoherence Score (1-5): 3")


def test_an_unreadable_answer_is_asked_for_again_and_then_stops_the_call_with_the_prompt(server):
    server.answer = lambda body: (200, completion("I cannot tell."))
    with pytest.raises(InputError, match=r"prompt 'a red circle': expected one 'Final Score: x'.*I cannot tell"):
        make(server, concurrency=1, attempts=3).score_images(images(2), PROMPTS)
    assert [PROMPTS[0] in asked_of(body)[0] for body in server.asked[:3]] == [True] * 3
    server.asked.clear()
    server.answer = lambda body: (200, completion("I cannot tell." if len(server.asked) < 3 else GOOD))
    assert make(server, attempts=3).score_images(images(1), PROMPTS[:1]).tolist() == [3.5]


def test_the_pause_doubles_up_to_a_minute_without_jitter(server, monkeypatch):
    waits = []
    monkeypatch.setattr("dinalrm_align.reward.http.time.sleep", waits.append)
    answers = [(429, "busy"), (500, "x"), (599, "x"), (200, "not JSON"), (200, completion("?"))] * 2
    server.answer = lambda body: answers[len(server.asked) - 1]
    with pytest.raises(InputError, match="expected one 'Final Score: x'"):
        make(server, attempts=10, pause=1.0).score_images(images(1), PROMPTS[:1])
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60] and len(server.asked) == 10


@pytest.mark.parametrize(
    ("model", "template"),
    [
        ("UnifiedReward", "point"), ("UnifiedReward-7b", "point"), ("CodeGoat24/UnifiedReward-7b-v1.5", "point"),
        ("CodeGoat24/UnifiedReward-qwen-32b", "point"), ("CodeGoat24/UnifiedReward-2.0-qwen-7b", "acs"),
        ("UnifiedReward-2.0-qwen3vl-2b", "acs"), ("UnifiedReward-12.0", "point"),
    ],
)  # fmt: skip
def test_the_served_version_selects_the_question(server, model, template):
    server.answer = lambda body: (200, completion(GOOD if template == "point" else ACS))
    found = load_reward(f"unifiedreward={server.url}#{model}")
    assert found.score_images(images(1), PROMPTS[:1]).tolist() == [3.5]
    (body,) = server.asked
    assert body["model"] == model and server.headers[0][0] == "/v1/chat/completions"
    assert asked_of(body)[0] == TEMPLATES[template].question.replace("{prompt}", PROMPTS[0])


@pytest.mark.parametrize("model", ["UnifiedReward-Think-qwen-7b", "UnifiedReward-Flex-8b", "UnifiedReward-Edit-7b"])
def test_versions_that_score_no_single_image_are_refused(model):
    with pytest.raises(ValueError, match=f"model: got {model}.*no prompt for the score of one image"):
        UnifiedReward.from_pretrained(model=model)
    assert UnifiedReward.from_pretrained(model=model, template="point").endpoint.model == model


def test_a_model_is_named_once():
    with pytest.raises(ValueError, match="model: got 'a', and 'b' in the address"):
        UnifiedReward.from_pretrained("http://127.0.0.1:1/v1#b", model="a")


def test_the_questions_ask_for_the_published_format():
    """The answer formats of the prompts in the model's repository."""
    assert "'element (type): value'" in TEMPLATES["point"].question and "'Final Score:'" in TEMPLATES["point"].question
    for name in ("words", "acs"):
        for line in ("Alignment Score (1-5): X", "Coherence Score (1-5): Y", "Style Score (1-5): Z"):
            assert f"\n{line}\n" in TEMPLATES[name].question
        assert ("Word-wise Scores: [[" in TEMPLATES[name].question) is (name == "words")
    assert all(template.question.endswith("Text Caption: [{prompt}]") for template in TEMPLATES.values())


@pytest.mark.parametrize(
    "text", ["not JSON", "{}", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}', "[]"]
)
def test_what_is_no_chat_completion_is_refused(server, text):
    server.answer = lambda body: (200, text)
    with pytest.raises(ValueError, match="not valid JSON|expected a chat completion"):
        make(server).score_images(images(1), PROMPTS[:1])
    assert len(server.asked) == 5  # may be a proxy in front of a server that restarts


def test_a_server_error_is_tried_again_so_many_times(server):
    server.answer = lambda body: (500, "out of memory") if len(server.asked) < 3 else (200, completion(GOOD))
    assert make(server, attempts=3).score_images(images(1), PROMPTS[:1]).tolist() == [3.5]
    server.asked.clear()
    server.answer = lambda body: (500, "out of memory")
    with pytest.raises(ConnectionError, match=r"no answer in 2 attempts.*HTTP 500: out of memory"):
        make(server, attempts=2).score_images(images(1), PROMPTS[:1])
    assert len(server.asked) == 2


def test_a_refusal_is_not_tried_again(server):
    server.answer = lambda body: (404, "no such model")
    with pytest.raises(ValueError, match="refuses the request .HTTP 404: no such model"):
        make(server).score_images(images(1), PROMPTS[:1])
    assert len(server.asked) == 1


def test_a_server_that_does_not_answer_is_given_up(server):
    server.answer = lambda body: (time.sleep(1.0), (200, completion(GOOD)))[1]
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no answer in 2 attempts of 0.1 s .*[Tt]imed? ?out"):
        make(server, timeout=0.1, attempts=2).score_images(images(1), PROMPTS[:1])
    assert time.monotonic() - start < 5


def test_no_server_at_all(server):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ConnectionError, match="is the server up"):
        make(server, attempts=1).score_images(images(1), PROMPTS[:1])


def test_asking_for_a_gradient_is_an_error_before_anything_is_asked(server, vae):
    reward = make(server, vae=vae, side=None)
    latents = torch.randn(2, 16, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match="not differentiable"):
        reward(latents, prompts=PROMPTS)
    with pytest.raises(ValueError, match="not differentiable"):
        reward.score_pixels(images().requires_grad_(), PROMPTS)
    assert not server.asked
    with torch.no_grad():
        scores = reward(latents, prompts=PROMPTS)
    assert scores.tolist() == [3.5, 3.5] and not scores.requires_grad
    sent = [asked_of(body) for body in server.asked]
    shown = {text: torch.tensor(list(image.tobytes())).view(16, 16, 3) for text, image in sent}
    with torch.no_grad():
        decoded = (decode_latents(vae, latents) * 255).round().long().permute(0, 2, 3, 1)
    for prompt, want in zip(PROMPTS, decoded):
        assert torch.equal(shown[TEMPLATES["point"].question.replace("{prompt}", prompt)], want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "file:///etc/passwd"}, "expected http://host:port/v1"),
        ({"source": "localhost:8080"}, "expected http://host:port/v1"),
        ({"source": "http://[::1/v1"}, "expected http://host:port/v1"),
        ({"source": "http://host:port/v1"}, "expected http://host:port/v1"),
        ({"source": "http://host/v1/ü"}, "expected http://host:port/v1"),
        ({"source": "http://host/v1 "}, "expected http://host:port/v1"),
        ({"model": ""}, "model"),
        ({"template": "points"}, "known: point, words, acs; did you mean 'point'"),
        ({"timeout": 0.0}, "timeout"),
        ({"attempts": 0}, "attempts"),
        ({"concurrency": 0}, "concurrency"),
        ({"side": 1}, "side"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UnifiedReward.from_pretrained(**options)


def test_a_question_without_a_place_for_the_prompt_is_refused(tmp_path):
    (tmp_path / "question.txt").write_text("How good is this?")
    with pytest.raises(ValueError, match="got 0 {prompt}; expected one"):
        UnifiedReward.from_pretrained(question=tmp_path / "question.txt")
    with pytest.raises(ValueError, match="got 2 {prompt}"):
        Template("{prompt} {prompt}", ("Final Score",))


def test_the_key_is_not_shown():
    assert "secret" not in repr(ChatEndpoint("http://127.0.0.1/v1", "m", api_key="secret"))
