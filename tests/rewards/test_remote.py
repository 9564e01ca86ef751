"""Remote rewards: a real server in this process, a client, and what goes wrong between the two."""

import base64
import contextlib
import http
import importlib
import io
import json
import os
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from rlr_trainer.cli import main
from rlr_trainer.rewards import RemoteReward, RemoteRewardError, RewardError, RewardServer
from rlr_trainer.rewards.remote import server as server_module
from rlr_trainer.rewards.remote.client import RETRIED_STATUSES, JsonClient
from rlr_trainer.rewards.remote.encoding import Pictures, WireError, encode_images

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = (IMAGES, ("a", "b", "c"), ({"n": 1}, {"n": 2}, {"n": 3}))


def eight_bits(images):
    return (images * 255).round() / 255


def mean(images, prompts, metadata):
    return images.flatten(1).mean(1)


@pytest.fixture
def serve(monkeypatch):
    """Starts servers; `RewardServer`'s arguments."""
    monkeypatch.delenv("RLR_REWARD_TOKEN", raising=False)
    with contextlib.ExitStack() as servers:
        yield lambda reward=mean, **options: servers.enter_context(RewardServer(reward, **({"port": 0} | options)))


def post(url, body, path="/score", **headers):
    """(status, error) of a request made by hand."""
    answer = httpx.post(url + path, content=body, headers={"Content-Type": "application/json"} | headers, timeout=10)
    message = answer.json()
    assert message["version"] == 1
    return answer.status_code, message.get("error")


def connect(url):
    return socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=5)


def message(**changes):
    fields = {"version": 1, "images": encode_images(IMAGES), "prompts": ["a", "b", "c"], "metadata": [{}, {}, {}]} | changes
    return json.dumps({key: value for key, value in fields.items() if value is not ...}).encode()


class Held:
    """A reward that waits until it is let go."""

    def __init__(self):
        self.begun, self.release, self.calls = threading.Event(), threading.Event(), []

    def __call__(self, images, prompts, metadata):
        self.calls.append(prompts)
        self.begun.set()
        self.release.wait(10)
        return [1] * len(prompts)


@pytest.fixture
def held():
    reward = Held()
    yield reward
    reward.release.set()


def test_pictures_arrive_rounded_to_eight_bits_and_not_a_second_time():
    arrived = Pictures(encode_images(IMAGES)).decode()
    torch.testing.assert_close(arrived, eight_bits(IMAGES), rtol=0, atol=1e-7)
    assert arrived.is_contiguous()
    assert torch.equal(Pictures(encode_images(arrived)).decode(), arrived)
    beyond = torch.tensor([-0.5, 1.5, 0.25]).reshape(1, 3, 1, 1).expand(1, 3, 2, 4)
    assert Pictures(encode_images(beyond)).decode()[0, :, 0, 0].tolist() == pytest.approx([0, 1, 64 / 255])
    assert Pictures([png(np.full((2, 2), 51, np.uint8))]).decode()[0, :, 0, 0].tolist() == pytest.approx([0.2] * 3)  # grey
    video = torch.rand(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Pictures(encode_images(video)).decode(), eight_bits(video), rtol=0, atol=1e-7)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def bare(width, height):
    """A PNG file with this size in its header and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, b"IDAT", b"IEND")
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def test_pictures_that_cannot_be():
    for images, says in ((torch.full((1, 3, 2, 2), torch.nan), "not finite"), (torch.zeros(1, 4, 2, 2), r"shape \(4, 2, 2\)")):
        with pytest.raises(WireError, match=says):
            encode_images(images)
    good = png(np.zeros((8, 8, 3), np.uint8))
    for encoded, says in (
        (["%%%"], "picture 0 of 'images' cannot be read as the base64 text"),
        ([good, png(np.zeros((8, 9, 3), np.uint8))], r"sizes \(width, height\) \[\(8, 8\), \(9, 8\)\]"),
        ([png(np.zeros((8, 8, 4), np.uint8))], "mode is 'RGBA'"),
        ([bare(2**30, 2**30)], "exceeds limit"),
        ([good, bare(8, 8)], "picture 1 of 'images' cannot be read"),
        ([[good], good], "same number of frames"),
        ([[]], "not empty"),
    ):
        with pytest.raises(WireError, match=says):
            Pictures(encoded).decode()


def test_what_the_function_gets_and_what_comes_back(serve):
    seen = []

    async def reward(images, prompts, metadata):
        seen.append((images.requires_grad, torch.is_grad_enabled(), prompts, metadata))
        first = metadata[0]["n"] - 1
        torch.testing.assert_close(images, eight_bits(IMAGES)[first : first + 2], rtol=0, atol=1e-7)
        return [1 / 3, None][: len(prompts)], {
            "words": prompts,
            "size": len(prompts),
            "score": torch.full((len(prompts),), torch.nan),
        }

    rewards, metadata = RemoteReward(serve(reward).url, batch_size=2)(IMAGES.clone().requires_grad_(), *BATCH[1:])
    assert seen == [(False, False, BATCH[1][part], BATCH[2][part]) for part in (slice(2), slice(2, 3))]
    assert rewards[0] == rewards[2] == torch.tensor(1 / 3)
    assert rewards.isnan().tolist() == [False, True, False]
    assert metadata == {"words": ["a", "b", "c"], "size": [2, 1], "score": [None] * 3}


def test_metadata_becomes_json_and_only_the_named_keys_are_sent(serve):
    seen = []
    url = serve(lambda images, prompts, metadata: seen.extend(metadata) or [0] * len(prompts)).url
    row = {"a": (1, 2), "b": np.float32(0.5), "c": torch.tensor([[1, 2]]), "d": None, "e": {"f": [True, "x"]}, "g": object()}
    RemoteReward(url, metadata_keys=list("abcde"))(*BATCH[:2], (row,) * 3)
    assert seen == [{"a": [1, 2], "b": 0.5, "c": [[1, 2]], "d": None, "e": {"f": [True, "x"]}}] * 3
    for keys, wrong, says in (
        (None, row, "is a object, which JSON does not have.*metadata_keys"),
        (["m"], row, r"KeyError\('m'\)"),
        (None, {"a": [1, float("nan")]}, "not JSON compliant"),
    ):
        with pytest.raises(WireError, match=says):
            RemoteReward(url, metadata_keys=keys)(*BATCH[:2], (wrong,) * 3)


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_calls_at_a_time_as_workers_and_pictures_are_decoded_in_them(serve, held, workers):
    """Requests that wait take no more memory than on the wire."""
    url = serve(held, workers=workers).url
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(RemoteReward(url), *BATCH) for _ in range(4)]
        time.sleep(0.2)
        damaged = pool.submit(post, url, message(images=[bare(8, 8)] * 3))
        time.sleep(0.2)
        assert len(held.calls) == workers and not damaged.done()
        held.release.set()
        assert [call.result()[0].tolist() for call in asked] == [[1, 1, 1]] * 4
        assert damaged.result()[0] == 400


def test_many_clients_at_once_each_get_their_own_answers(serve):
    url = serve(lambda images, prompts, metadata: images.sum((1, 2, 3)) + metadata[0]["n"], workers=2).url

    def ask(number):
        images = torch.rand(1 + number % 3, 3, 16, 16, generator=torch.Generator().manual_seed(number))
        rewards, _ = RemoteReward(url)(images, ("x",) * len(images), ({"n": 1000 * number},) * len(images))
        torch.testing.assert_close(rewards, eight_bits(images).sum((1, 2, 3)) + 1000 * number, rtol=0, atol=0.01)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(60))) == [None] * 60


def test_garbage_is_answered_with_the_reason(serve):
    url = serve(max_megapixels=576 / 10**6, workers=3).url
    for body, says in (
        (b"[" * 100_000, "the body: Invalid JSON: recursion limit"),
        (b"[]", "the body: Input should be"),
        (message(version=2), "version: Input should be 1"),
        (message(prompts=...), "prompts: Field required"),
        (message(prompts=["a"]), "3 images, 1 prompts and 3 metadata"),
        (message(images=[3]), "images.0.str: Input should be a valid string"),
        (message(images=[bare(8, 9)] * 3), "3 entries of 8 x 9: the pictures of one request may have 192 pixels"),
    ):
        status, error = post(url, body)
        assert status == 400 and says in error, (says, error)
    assert post(url, message())[0] == 200
    assert post(url, message(), **{"Content-Type": "text/plain"})[0] == 415
    assert post(url, message(), path="/no") == (404, "Not Found")


def test_the_token(serve, monkeypatch):
    url = serve(token="sesame").url
    for token in (None, "sesame2", "sesam"):
        with pytest.raises(RemoteRewardError, match=r"401 Unauthorized: the token is missing or wrong.*attempt 1 of 4") as caught:
            RemoteReward(url, token=token, retries=3)(*BATCH)
        assert caught.value.status == 401
        assert "sesam" not in str(caught.value)
    assert post(url, message(), Authorization=b"Bearer s\xe9same")[0] == 401
    monkeypatch.setenv("RLR_REWARD_TOKEN", "sesame")
    assert len(RemoteReward(url)(*BATCH)[0]) == 3


@pytest.mark.medium
def test_without_a_token_only_names_of_this_machine_are_answered(serve, caplog):
    """A web page whose own name resolves to 127.0.0.1 could ask otherwise."""
    url = serve().url
    for host in ("localhost", "127.8.8.8:8000", "[::1]:8000"):
        answer = httpx.get(url + "/health", headers={"Host": host}).json()
        assert answer == {"version": 1, "status": "ok", "reward": "mean"}
    for host in ("localhost.attacker.example:8000", "192.168.1.7", "[", ""):
        assert httpx.get(url + "/health", headers={"Host": host}).status_code == 403
        status, error = post(url, message(), Host=host)
        assert status == 403 and re.search(r"names of its own machine.*start it with a token \(--token, or RLR_", error)
    assert post(serve(token="x").url, message(), Host="gpu-box", Authorization="Bearer x")[0] == 200
    for token, warned in (("x", False), (None, True)):
        serve(host="0.0.0.0", token=token)
        assert ("on 0.0.0.0 without a token" in caplog.text) == warned


def test_a_request_above_the_limit_is_refused_and_the_client_is_told_what_to_do(serve):
    """Though it still sends when the server has seen enough."""
    big = torch.rand(8, 3, 512, 512, generator=torch.Generator().manual_seed(2))
    with pytest.raises(RemoteRewardError, match=r"413.*the limit is 0\.05 MB.*batch_size") as caught:
        RemoteReward(serve(max_request_mb=0.05).url, retries=3)(big, ("a",) * 8, ({},) * 8)
    assert (caught.value.status, caught.value.attempts) == (413, 1)


def test_an_exception_of_the_reward_is_told_and_tried_again(serve, caplog):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        if len(calls) == 2:
            return [1, 2, 3], {"x": object()}
        raise KeyError("answer")

    with pytest.raises(RemoteRewardError, match=r"500.*reward 'reward' raised KeyError: 'answer' \(attempt 3 of 3") as caught:
        RemoteReward(serve(reward).url, retries=2, backoff=0.01)(*BATCH)
    assert len(calls) == caught.value.attempts == 3
    warnings = [r.getMessage() for r in caplog.records if r.name.endswith("remote.client")]
    assert re.search("KeyError: 'answer' .attempt 1 of 3", warnings[0])
    assert re.search("is a object, which JSON does not have .attempt 2 of 3", warnings[1])


def test_options_that_cannot_be():
    for options, says in (
        ({"url": "localhost:8000"}, "must be like http"),
        ({"url": "http://user:secret@host"}, "a secret goes into token"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"retries": -1}, "retries=-1"),
        ({"token": "a\r\nX: y"}, "token"),
        ({"groupwise": True, "batch_size": 2}, "batch_size=2.*tears groups apart"),
    ):
        with pytest.raises(ValueError, match=says):
            RemoteReward(**({"url": "http://127.0.0.1:1"} | options))
    for options in ({"workers": 0}, {"token": "a\nb"}, {"receive_timeout": float("nan")}, {"port": 70000}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RewardServer(mean, **({"port": 0} | options))


def test_without_the_extra_the_error_names_it(monkeypatch):
    for module in [module for module in sys.modules if "rewards.remote" in module or module.endswith("neural.questions")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "httpx", None)
    for name in ("RewardServer", "QuestionReward"):
        with pytest.raises(ImportError, match=r'need httpx: pip install "rlr-trainer\[remote\]"'):
            getattr(importlib.import_module("rlr_trainer.rewards"), name)


def test_a_slow_reward_is_given_up_and_costs_no_further_calls(serve, held):
    url = serve(held).url
    with pytest.raises(RemoteRewardError, match=r"no answer within timeout=0\.2 s \(attempt 3 of 3"):
        RemoteReward(url, timeout=0.2, retries=2, backoff=0)(*BATCH)
    held.release.set()
    assert RemoteReward(url)(*BATCH)[0].tolist() == [1, 1, 1]
    assert len(held.calls) == 2  # the first and the last: the attempts between were given up while they waited for their turn


def test_a_server_that_is_away_and_comes_back(serve, held):
    first = serve(held)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(RemoteReward(first.url, retries=20, backoff=0.1), *BATCH)
        assert held.begun.wait(5)
        assert not first.stop(grace=0)
        with pytest.raises(RemoteRewardError, match=rf"{first.url}/score: no connection: .*refused.*attempt 2 of 2") as caught:
            RemoteReward(first.url, retries=1, backoff=0.01)(*BATCH)
        assert caught.value.status is None
        assert isinstance(caught.value, RewardError)
        serve(port=int(first.url.rsplit(":", 1)[1]))
        torch.testing.assert_close(asked.result()[0], mean(eight_bits(IMAGES), None, None))


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n"],
    ids=["head", "body", "body without a length"],
)  # fmt: skip
def test_an_answer_that_trickles_is_given_up(head):
    """Each byte comes in time; the whole answer does not."""
    ended = threading.Event()

    def drip(listener):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):  # the client has gone
            connection.recv(1 << 16)
            connection.sendall(head)
            while not ended.wait(0.05):
                connection.sendall(b"1")

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(drip, listener)
        started = time.monotonic()
        try:
            client = JsonClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.5, retries=0, backoff=0, token=None)
            threading.Timer(10, ended.set).start()  # where it is not given up, the test must end all the same
            with pytest.raises(RemoteRewardError, match=r"no answer within timeout=0\.5 s \(attempt 1 of 1"):
                client.post(b"{}")
        finally:
            ended.set()
    assert 0.4 < time.monotonic() - started < 8


def test_a_body_that_trickles_is_given_up(serve):
    """Each byte comes in time; the whole body does not."""
    with connect(serve(receive_timeout=0.3).url) as connection:
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        )
        for _ in range(5):
            connection.sendall(b"x")
            time.sleep(0.05)
        said = b"".join(iter(lambda: connection.recv(4096), b""))  # until the server closes the connection
    assert re.match(rb"HTTP/1.1 408 .*longer than 0.3 s", said, re.DOTALL)


def test_more_connections_than_the_server_takes(serve, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 1)
    url = serve().url + "/health"
    assert httpx.get(url).status_code == 200
    with connect(url):
        time.sleep(0.1)
        assert httpx.get(url).status_code == 503


def test_stopping_answers_what_is_under_way_and_refuses_what_waits(serve, held):
    server = serve(held)
    client = RemoteReward(server.url, retries=0)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(client, *BATCH)
        held.begun.wait(5)
        second = pool.submit(client, *BATCH)
        time.sleep(0.3)
        stopped = pool.submit(server.stop, 5)
        with pytest.raises(RemoteRewardError, match="503.*shutting down"):
            second.result()
        held.release.set()
        assert first.result()[0].tolist() == [1, 1, 1]
        assert stopped.result() is True


def fake(*answers):
    """URL of a server that gives these bytes as its answers, and the bodies that it has got."""
    listener, seen = socket.create_server(("127.0.0.1", 0)), []

    def run():
        with listener:
            for answer in answers:
                with listener.accept()[0] as connection, connection.makefile("rb") as sent:
                    head = b"".join(iter(sent.readline, b"\r\n"))
                    seen.append(sent.read(int(re.search(rb"(?i)content-length: (\d+)", head)[1])))
                    connection.sendall(answer)

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", seen


def answer(status, body=b"", header="X: y"):
    return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{header}\r\nConnection: close\r\n\r\n".encode() + body


OK = json.dumps({"version": 1, "rewards": [1, 2, 3], "metadata": {}}).encode()


def test_failures_that_may_pass_are_tried_again():
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + OK
    url, seen = fake(*map(answer, sorted(RETRIED_STATUSES)), cut, b"", b"nonsense\r\n\r\n", answer(200, OK))
    state = random.getstate(), torch.get_rng_state()
    assert RemoteReward(url, retries=20, backoff=0.001)(*BATCH)[0].tolist() == [1, 2, 3]
    assert len(seen) == len(RETRIED_STATUSES) + 4
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_answers_that_are_final():
    other, other_seen = fake(answer(200, OK))  # a redirection would carry the token there
    for raw, says in (
        (answer(302, header=f"Location: {other}/score"), "answered 302 Found"),
        (answer(400, b"<html>why\n not</html>"), "answered 400 Bad Request: <html>why not"),
        (answer(200, b"<html>"), "something else than JSON"),
        (answer(200, b'{"version": 1, "rewards": [1, NaN, 2]}'), "rewards.1: Input should be a finite number"),
        (answer(200, OK.replace(b"2, ", b"")), "2 rewards for 3 pictures"),
    ):
        url, seen = fake(raw)
        with pytest.raises(RemoteRewardError, match=says):
            RemoteReward(url, backoff=0.01)(*BATCH)
        assert (len(seen), len(other_seen)) == (1, 0)


def test_pauses_double_with_jitter_obey_retry_after_and_end_at_a_stop():
    asked = ["7", *[None] * 7, "100", "soon"]
    url, seen = fake(*[answer(429, header=f"Retry-After: {value}" if value else "X: y") for value in asked])
    clock, waits = threading.Event(), []
    clock.wait = lambda seconds: waits.append(seconds) or len(waits) == 10
    with pytest.raises(RemoteRewardError, match="429 Too Many Requests .attempt 10 of 21"):
        JsonClient(url, timeout=5, retries=20, backoff=0.25, token=None).post(b"", clock)
    factors = [wait / (0.25 * 2**i) for i, wait in enumerate(waits[1:8], 1)]
    assert len(set(factors)) == 7 and all(0.5 <= factor <= 1 for factor in factors)
    assert waits[0] == 7 and waits[8] == 60  # never more than a minute
    assert 30 <= waits[9] <= 60
    assert len(seen) == 10


def test_proxies_are_not_asked_for_this_machine(serve, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert len(RemoteReward(serve().url, retries=0)(*BATCH)[0]) == 3
    with pytest.raises(RemoteRewardError, match="no connection"):  # the proxy's
        RemoteReward("http://reward.example", retries=0)(*BATCH)


@pytest.mark.medium
def test_where_nothing_has_ever_answered_the_attempts_are_few(serve):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(RewardError, match=r"attempt 3 of 3.*check the URL and start the server, or wait longer with retries=8"):
        RemoteReward(url, backoff=0.01)(*BATCH)
    with pytest.raises(RewardError, match=r"attempt 4 of 4(?!.*start the server)"):
        RemoteReward(url, backoff=0.01, retries=3)(*BATCH)
    server = serve()
    reward = RemoteReward(server.url, backoff=0.01)
    reward(*BATCH)
    server.stop(1)
    with pytest.raises(RewardError, match="attempt 9 of 9"):  # it was there: it may come back
        reward(*BATCH)


def run_serve_reward(reward, monkeypatch, *numbers):
    """(exit code, rewards) of the command, run here, which gets signals while it computes the rewards of a request."""
    monkeypatch.setattr("rlr_trainer.cli.settings.load_reward", lambda name: reward)
    monkeypatch.setenv("RLR_REWARD_TOKEN", "sesame")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]

    def send():
        reward.begun.wait(10)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)
        if len(numbers) == 1:
            reward.release.set()

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with ThreadPoolExecutor(2) as pool:
            asked = pool.submit(RemoteReward(f"http://127.0.0.1:{port}", retries=9, backoff=0.1), *BATCH)
            pool.submit(send)
            return main(["serve-reward", "held", "--port", str(port)]), asked.result()[0].tolist()
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def test_a_signal_finishes_the_requests_under_way(monkeypatch, capsys, held):
    assert run_serve_reward(held, monkeypatch, signal.SIGTERM) == (0, [1, 1, 1])
    assert re.fullmatch(r"serving reward 'Held' on http://127.0.0.1:\d+ \(Ctrl-C stops\)\nstopped\n", capsys.readouterr().out)


def test_a_second_signal_leaves_at_once(monkeypatch, held):
    """The thread of a reward that hangs would keep the process alive."""

    def leave(code):
        assert time.monotonic() - started < 5  # the reward hangs for 10
        held.release.set()
        raise SystemExit(code)

    started = time.monotonic()
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"):
        run_serve_reward(held, monkeypatch, signal.SIGINT, signal.SIGINT)
