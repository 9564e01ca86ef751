"""`QuestionReward` against a small endpoint with the protocol of OpenAI's chat completions."""

import base64
import io
import json
import math
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from rlr_trainer.rewards import QuestionReward, RemoteRewardError, RewardError, Rewards
from rlr_trainer.rewards.neural.questions import parse_score, parse_yes_no, yes_probability

IMAGES = torch.stack([torch.full((3, 8, 8), level / 4) for level in range(5)])  # picture i has the brightness i / 4
PROMPTS = tuple("abcde")
ROWS = tuple({"color": color} for color in ("red", "green", "blue", "black", "white"))


class Endpoint:
    """Answers with what `answer(brightness, question)` says: a text, a choice's dict, or (status, body)."""

    def __init__(self):
        self.requests, self.headers, self.paths = [], [], []
        self.running, self.most_running = 0, 0
        self.answer = lambda brightness, question: "yes"
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                endpoint.handle(self)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def handle(self, handler):
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append(request)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        text, picture = request["messages"][-1]["content"][:2]
        start, data = picture["image_url"]["url"].split(",")
        assert start == "data:image/png;base64"
        brightness = float(np.array(Image.open(io.BytesIO(base64.b64decode(data)))).mean() / 255)
        said = self.answer(brightness, text["text"])
        status, body = said if isinstance(said, tuple) else (200, self.completion(said))
        with self.lock:
            self.running -= 1
        data = json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    @staticmethod
    def completion(said):
        choice = {"message": {"role": "assistant", "content": said}} if isinstance(said, str) else said
        return {
            "id": "1",
            "object": "chat.completion",
            "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None} | choice],
        }


@pytest.fixture
def endpoint():
    running = Endpoint()
    yield running
    running.server.shutdown()
    running.server.server_close()


def with_logprobs(tokens):
    """A choice whose first token has these probabilities, the largest of them written."""
    top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in tokens.items()]
    best = max(top, key=lambda entry: entry["logprob"])
    return {
        "message": {"role": "assistant", "content": best["token"]},
        "logprobs": {"content": [best | {"top_logprobs": top}]},
    }


def ask(endpoint, images=IMAGES, rows=ROWS, **options):
    return QuestionReward(endpoint.url, "tiny", **({"backoff": 0.01} | options))(
        images, PROMPTS[: len(images)], rows[: len(images)]
    )


# ---- whole questions ----


def test_the_probability_of_yes_from_logprobs(endpoint):
    endpoint.answer = lambda brightness, question: with_logprobs(
        {"Yes": 0.1 + 0.5 * brightness, " yes": 0.05, "No": 0.2, "maybe": 0.1}
    )
    rewards, metadata = ask(endpoint)
    expected = [(0.15 + 0.5 * i / 4) / (0.35 + 0.5 * i / 4) for i in range(5)]
    assert rewards == pytest.approx(expected, abs=0.002)  # a picture's brightness is rounded to eight bits
    assert metadata["answers"][-1] == "Yes"


def test_a_text_counts_where_there_are_no_logprobs(endpoint):
    endpoint.answer = lambda brightness, question: "Yes." if brightness > 0.6 else "no, it does not"
    rewards, metadata = ask(endpoint)
    assert rewards == [0, 0, 0, 1, 1]
    assert metadata == {"answers": ["no, it does not"] * 3 + ["Yes."] * 2}


def test_what_is_asked(endpoint):
    ask(
        endpoint,
        images=IMAGES[:1],
        question="Is {prompt} {color}? {{json}}",
        system="Be strict.",
        token="key",
        request_options={"max_tokens": None, "max_completion_tokens": 4, "seed": 1},
    )
    request = endpoint.requests[0]
    assert endpoint.paths == ["/v1/chat/completions"]
    assert endpoint.headers[0]["Authorization"] == "Bearer key"
    assert request["messages"][0] == {"role": "system", "content": "Be strict."}
    assert request["messages"][1]["content"][0] == {"type": "text", "text": "Is a red? {json}"}
    del request["messages"]
    assert request == {
        "model": "tiny", "temperature": 0, "logprobs": True, "top_logprobs": 20, "max_completion_tokens": 4, "seed": 1,
    }  # fmt: skip
    rows = ({"color": "{prompt.__class__}{0}"},)  # values are no templates
    ask(endpoint, images=IMAGES[:1], question="{prompt} {color}", rows=rows, logprobs=False)
    assert endpoint.requests[1]["messages"][0]["content"][0]["text"] == "a {prompt.__class__}{0}"
    assert "logprobs" not in endpoint.requests[1]
    assert endpoint.requests[1]["max_tokens"] == 16


def test_scores_are_mapped_to_one(endpoint):
    endpoint.answer = lambda brightness, question: f"Score: {round(1 + 4 * brightness, 1):.2f}"
    rewards, _ = ask(endpoint, answer="score", score_range=(1, 5))
    assert rewards == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.005)
    assert "logprobs" not in endpoint.requests[0]
    rewards, _ = ask(endpoint, answer=lambda text: float(text[7:]))  # a function reads the answers
    assert rewards == [1, 2, 3, 4, 5]


def test_videos_are_asked_about_with_all_frames(endpoint):
    ask(endpoint, images=torch.rand(1, 3, 3, 4, 4))
    assert [part["type"] for part in endpoint.requests[0]["messages"][0]["content"]] == ["text", *["image_url"] * 3]


def test_answers_that_cannot_be_read_are_dropped_and_counted(endpoint, caplog):
    refusal = {"message": {"content": None, "refusal": "I cannot help with that."}}
    endpoint.answer = lambda brightness, question: refusal if 0.4 < brightness < 0.6 else "yes"
    result = Rewards(QuestionReward(endpoint.url, "tiny"))(IMAGES, PROMPTS, ROWS, differentiable=False)
    assert result.total.isnan().tolist() == [False, False, True, False, False]
    assert result.metadata["answers"][2] == "I cannot help with that."
    assert "1 of 5 answers of tiny could not be read, such as ['I cannot help with that.']; they must be yes or no" in caplog.text


def test_a_key_that_the_metadata_lacks(endpoint):
    with pytest.raises(RewardError, match=r"needs size, but the metadata of prompt 'a' has color, prompt"):
        ask(endpoint, question="{prompt} {size}")
    assert not endpoint.requests


# ---- many questions at once, and trouble ----


def test_questions_run_at_the_same_time_and_keep_their_order(endpoint):
    delays = random.Random(0)

    def answer(brightness, question):
        time.sleep(delays.uniform(0.01, 0.08))
        return f"{10 * brightness:.3f}"

    endpoint.answer = answer
    images = torch.stack([torch.full((3, 4, 4), i / 31) for i in range(32)])
    reward = QuestionReward(endpoint.url, "tiny", answer="score", concurrency=6)
    rewards, _ = reward(images, tuple(map(str, range(32))), ({},) * 32)
    assert rewards == pytest.approx([round(255 * i / 31) / 255 for i in range(32)], abs=1e-3)
    assert 2 <= endpoint.most_running <= 6


def test_a_failure_ends_the_whole_batch_soon(endpoint):
    endpoint.answer = lambda brightness, question: (
        (401, {"error": {"message": "bad key", "code": None}}) if brightness == 1 else (503, {})
    )
    started = time.monotonic()
    with pytest.raises(RemoteRewardError, match="401 Unauthorized: bad key"):
        ask(endpoint, retries=100, backoff=1, concurrency=5)
    assert time.monotonic() - started < 5


def test_a_refusal_of_logprobs_says_what_to_set(endpoint):
    endpoint.answer = lambda brightness, question: (400, {"error": {"message": "unknown field logprobs"}})
    with pytest.raises(RemoteRewardError, match="400 Bad Request: unknown field logprobs.*; set logprobs=False"):
        ask(endpoint)


def test_something_that_is_no_chat_endpoint(endpoint):
    for body in ({}, [], {"choices": []}, {"choices": [{"text": "yes"}]}, {"choices": "x"}):
        endpoint.answer = lambda brightness, question, body=body: (200, body)
        with pytest.raises(RemoteRewardError, match="is it a chat endpoint"):
            ask(endpoint, images=IMAGES[:1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"question": "{}"}, r"each pair of braces must be \{prompt\} or a key"),
        ({"question": "{0}"}, "must be {prompt} or a key"),
        ({"question": "{prompt.x}"}, "must be {prompt} or a key"),
        ({"question": "{prompt"}, "must be {prompt} or a key"),
        ({"answer": "maybe"}, "answer='maybe'"),
        ({"score_range": (5, 5)}, "score_range"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"url": "host"}, "must be like http"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        QuestionReward(**({"url": "http://127.0.0.1:1/v1", "model": "tiny"} | options))


# ---- reading answers ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Yes", 1), ("yes, it does", 1), (" **No**.", 0), ("NO", 0), ("\nyes", 1), ("<think>No? Yes.</think>\nno", 0),
        ("nothing", None), ("yesterday", None), ("I think yes", None), ("", None), ("<think>Yes", None),
    ],
)  # fmt: skip
def test_yes_and_no_in_a_text(text, value):
    assert parse_yes_no(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), ("7.5", 7.5), ("Score: 8", 8), ("8/10", 8), ("8 out of 10.", 8), ("**9**", 9), ("I give it a 3.", 3), ("10/10", 10),
        ("<think>maybe 4 or 5</think>6", 6), ("0", 0), ("10", 10), ("+2", 2),
        ("11", None), ("-1", None), ("7 or 8", None), ("none", None), ("", None), ("8/100", None), ("7,5", None), ("v2", None), ("1.2.3", None),
        ("1e3", None),
    ],
)  # fmt: skip
def test_a_number_in_a_text(text, value):
    assert parse_score(text, 0, 10) == (value if value is None else value / 10)


def content(*tokens):
    return {"content": [{"token": t, "logprob": -0.1, "top_logprobs": [{"token": k, "logprob": math.log(p)} for k, p in top.items()]} for t, top in tokens]}  # fmt: skip  # noqa: E501


def test_yes_and_no_among_the_logprobs():
    assert yes_probability(content(("Yes", {"Yes": 0.6, "No": 0.2}))) == pytest.approx(0.75)
    assert yes_probability(content(("\n", {"\n": 0.9}), ("**", {"**": 0.9}), ("no", {"no": 0.3, "yes": 0.1}))) == pytest.approx(
        0.25
    )
    assert yes_probability(content(("YES", {"YES": 0.9, "maybe": 0.1}))) == 1
    assert yes_probability(content(("\u2581No", {"\u2581No": 0.9, "x": 0.1}))) == 0
    assert yes_probability(content(("The", {"The": 0.9}), ("yes", {"yes": 0.9}))) is None
    for nothing in (None, {}, {"content": None}, {"content": []}, content(), {"content": [{"token": "Yes", "logprob": None}]}):
        assert yes_probability(nothing) is None
    assert yes_probability({"content": [{"token": "Yes", "logprob": -0.5, "top_logprobs": []}]}) == 1
