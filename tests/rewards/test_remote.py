"""Remote rewards: a real server, started by the command line or in this process, and what goes wrong between the two."""

import base64
import io
import json
import logging
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from programs import environment

from rlr_trainer.estimators import NonDifferentiableRewardError
from rlr_trainer.rewards import RewardError, Rewards
from rlr_trainer.rewards.remote import server as server_module
from rlr_trainer.rewards.remote.client import RemoteReward
from rlr_trainer.rewards.remote.encoding import WireError, decode_images, encode_images, to_json
from rlr_trainer.rewards.remote.http_client import RETRIED_STATUSES, JsonClient, RemoteRewardError
from rlr_trainer.rewards.remote.server import RewardServer

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = (IMAGES, ("a", "b", "c"), ({"n": 1}, {"n": 2}, {"n": 3}))
REWARD_FILE = """
import os, time

def add(images, prompts, metadata):
    time.sleep(max(row.get("sleep", 0) for row in metadata))
    return [float(image.sum()) + len(p) + row["n"] for image, p, row in zip(images, prompts, metadata)], {"pid": [os.getpid()] * len(prompts)}
"""


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("RLR_REWARD_TOKEN", raising=False)


def eight_bits(images):
    return (images * 255).round() / 255


def mean(images, prompts, metadata):
    return images.flatten(1).mean(1)


@pytest.fixture
def serve():
    """Starts servers in this process; `RewardServer`'s arguments."""
    servers = []

    def start(reward=mean, **options):
        servers.append(RewardServer(reward, port=0, **options))
        servers[-1].start()
        return servers[-1]

    yield start
    for running in servers:
        running.stop(grace=5)


class Process:
    """`rlr-trainer serve-reward` in a process of its own."""

    def __init__(self, folder, port=0, token=None, arguments=()):
        command = [sys.executable, "-m", "rlr_trainer.cli", "serve-reward", "served:add", "--port", str(port), *arguments]
        variables = environment(folder) | ({"RLR_REWARD_TOKEN": token} if token else {})
        self.popen = subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.popen.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + self.popen.stderr.read()
        self.url, self.port = found[0], int(found[1])

    def end(self, number=signal.SIGTERM):
        self.popen.send_signal(number)
        output, errors = self.popen.communicate(timeout=30)
        return self.popen.returncode, output, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    (path / "served.py").write_text(REWARD_FILE)
    return path


@pytest.fixture(scope="module")
def process(folder):
    running = Process(folder, token="sesame")
    yield running
    running.popen.kill()
    running.popen.communicate()


def raw_post(url, body, headers=None):
    """(status, parsed answer) of a request made by hand."""
    request = urllib.request.Request(url + "/score", body, {"Content-Type": "application/json"} | (headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def message(**changes):
    fields = {"version": 1, "images": encode_images(IMAGES), "prompts": ["a", "b", "c"], "metadata": [{}, {}, {}]} | changes
    return json.dumps({key: value for key, value in fields.items() if value is not ...}).encode()


# ---- pictures and metadata on the wire ----


def test_pictures_arrive_rounded_to_eight_bits_and_not_a_second_time():
    arrived = decode_images(encode_images(IMAGES), 10**6)
    assert arrived.dtype == torch.float32
    torch.testing.assert_close(arrived, eight_bits(IMAGES), rtol=0, atol=1e-7)
    assert (arrived - IMAGES).abs().max() <= 1 / 510 + 1e-6
    assert torch.equal(decode_images(encode_images(arrived), 10**6), arrived)
    beyond = torch.tensor([-0.5, 1.5, 0.25]).reshape(1, 3, 1, 1).expand(1, 3, 2, 4)
    assert decode_images(encode_images(beyond), 10**6)[0, :, 0, 0].tolist() == pytest.approx([0, 1, 64 / 255])


def test_videos_arrive_frame_by_frame():
    video = torch.rand(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(decode_images(encode_images(video), 10**6), eight_bits(video), rtol=0, atol=1e-7)


def test_pictures_that_cannot_be_sent():
    with pytest.raises(WireError, match="not finite"):
        encode_images(torch.full((1, 3, 2, 2), torch.nan))
    with pytest.raises(WireError, match=r"shape \(1, 4, 2, 2\)|shape \(4, 2, 2\)"):
        encode_images(torch.zeros(1, 4, 2, 2))


def png(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", **options)
    return base64.b64encode(buffer.getvalue()).decode()


def handmade(*chunks):
    """A PNG file of these chunks, each the type and the data."""
    data = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return base64.b64encode(data).decode()


def header(width, height):
    return b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def black(width, height):
    return b"IDAT" + zlib.compress(bytes(1 + 3 * width) * height)


def bomb(width, height):
    """The start of a PNG that says it is huge, with data that is not there."""
    return handmade(header(width, height), b"IDAT" + zlib.compress(b"\0" * 1000), b"IEND")


GOOD = png(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([], "at least one picture"),
        ("x", "at least one picture"),
        ([3], r"images\[0\] is a number"),
        (["%%%"], r"images\[0\] is not the base64 text"),
        ([base64.b64encode(b"GIF89a" + b"\0" * 40).decode()], "is not the base64 text of a PNG"),
        ([GOOD[:64]], "is not the base64 text of a PNG"),
        ([GOOD, png(np.zeros((8, 9, 3), np.uint8))], r"images\[1\] is 9 x 8, but the first picture 8 x 8"),
        ([png(np.zeros((8, 8, 4), np.uint8))], "mode 'RGBA'"),
        ([png(np.zeros((8, 8), np.uint16))], "mode 'I;16'"),
        ([bomb(2**30, 2**30)], "images"),
        ([bomb(4000, 4000)], "4000 x 4000: the pictures of one request may have 1000000 pixels"),
        ([handmade(header(1, 1), header(2000, 2000), black(2000, 2000), b"IEND")], "two headers"),
        ([handmade(header(8, 8), black(8, 8), b"iCCP", b"IEND")], "is not the base64 text of a PNG"),
        ([[GOOD], [GOOD, GOOD]], "same number of frames"),
        ([[GOOD], GOOD], "same number of frames"),
        ([[]], "same number of frames"),
    ],
)
def test_pictures_that_cannot_be_read(images, says):
    with pytest.raises(WireError, match=says):
        decode_images(images, 10**6)


def test_a_grey_picture_is_three_equal_channels():
    assert decode_images([png(np.full((2, 2), 51, np.uint8))], 100)[0, :, 0, 0].tolist() == pytest.approx([0.2] * 3)


def test_metadata_becomes_json():
    row = {"a": (1, 2), "b": np.float32(0.5), "c": torch.tensor([[1, 2]]), "d": None, "e": {"f": [True, "x"]}, "g": np.int64(3)}
    assert to_json(row, "m") == {"a": [1, 2], "b": 0.5, "c": [[1, 2]], "d": None, "e": {"f": [True, "x"]}, "g": 3}
    assert to_json([float("nan")], "m", nan_as_null=True) == [None]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": {"b": object()}}, r"m\['a'\]\['b'\] is a object"),
        ({"a": [1, float("inf")]}, r"m\['a'\]\[1\] is inf"),
        ({1: 2}, r"m has the key 1 \(int\)"),
        ({"a": b"x"}, r"m\['a'\] is a bytes"),
    ],
)
def test_metadata_that_json_does_not_have(value, says):
    with pytest.raises(WireError, match=says):
        to_json(value, "m")
    deep = []
    deep.append(deep)
    with pytest.raises(WireError, match="nested"):
        to_json(deep, "m")


# ---- client and server ----


def test_a_served_reward_equals_the_function_itself(serve):
    url = serve().url
    rewards, metadata = RemoteReward(url)(*BATCH)
    torch.testing.assert_close(rewards, mean(eight_bits(IMAGES), None, None), rtol=0, atol=1e-6)
    assert metadata == {}
    with urllib.request.urlopen(url + "/health", timeout=5) as response:
        assert json.loads(response.read()) == {"version": 1, "status": "ok", "reward": "mean"}


def test_what_the_function_gets_and_what_comes_back(serve):
    seen = []

    def reward(images, prompts, metadata):
        seen.append((images.shape, images.requires_grad, torch.is_grad_enabled(), prompts, metadata))
        return [1, None, float("nan")], {"words": ("x", "y", "z"), "score": torch.tensor([0.5, float("nan"), 2.0])}

    rewards, metadata = RemoteReward(serve(reward).url)(IMAGES.clone().requires_grad_(), *BATCH[1:])
    assert seen == [((3, 3, 8, 8), False, False, *BATCH[1:])]
    assert rewards[0] == 1
    assert rewards.isnan().tolist() == [False, True, True]
    assert metadata == {"words": ["x", "y", "z"], "score": [0.5, None, 2.0]}


def test_an_async_function_is_served(serve):
    async def reward(images, prompts, metadata):
        return [len(prompt) for prompt in prompts]

    assert RemoteReward(serve(reward).url)(*BATCH)[0].tolist() == [1, 1, 1]


def test_requests_of_at_most_batch_size_keep_the_order(serve):
    def reward(images, prompts, metadata):
        return [row["n"] for row in metadata], {"words": list(prompts), "size": len(prompts)}

    rewards, metadata = RemoteReward(serve(reward).url, batch_size=2)(*BATCH)
    assert rewards.tolist() == [1, 2, 3]
    assert metadata == {"words": ["a", "b", "c"], "size": [2, 1]}


def test_only_the_named_keys_are_sent(serve):
    seen = []

    def reward(images, prompts, metadata):
        seen.extend(metadata)
        return [0] * len(prompts)

    url = serve(reward).url
    rows = tuple({"n": i, "picture": object()} for i in range(3))
    RemoteReward(url, metadata_keys=["n"])(*BATCH[:2], rows)
    assert seen == [{"n": 0}, {"n": 1}, {"n": 2}]
    with pytest.raises(WireError, match=r"metadata\[0\]\['picture'\] is a object.*metadata_keys"):
        RemoteReward(url)(*BATCH[:2], rows)
    with pytest.raises(WireError, match=r"metadata\[0\] lacks \['m'\]"):
        RemoteReward(url, metadata_keys=["m"])(*BATCH[:2], rows)


def test_no_gradient_comes_back(serve):
    with pytest.raises(NonDifferentiableRewardError, match="remote"):
        Rewards(RemoteReward(serve().url))(IMAGES.clone().requires_grad_(), *BATCH[1:], differentiable=True)


def test_one_call_at_a_time_unless_more_workers_are_asked_for(serve):
    def most_at_once(workers):
        running, most, lock = [], [], threading.Lock()

        def reward(images, prompts, metadata):
            with lock:
                running.append(1)
                most.append(len(running))
            time.sleep(0.15)
            with lock:
                running.pop()
            return [0] * len(prompts)

        client = RemoteReward(serve(reward, workers=workers).url)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: client(*BATCH), range(4)))
        return max(most)

    assert most_at_once(1) == 1
    assert most_at_once(3) > 1


# ---- refusals ----


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b"[]", 400, "must be an object"),
        (message(version=2), 400, "'version' is 2: this server speaks version 1"),
        (message(version=...), 400, "'version' is None"),
        (message(prompts=...), 400, "lacks prompts"),
        (message(extra=1), 400, "unknown keys 'extra'"),
        (message(prompts=["a"]), 400, "3 images, 1 prompts and 3 metadata"),
        (message(prompts=[1, 2, 3]), 400, "'prompts' must be a list of strings"),
        (message(metadata={}), 400, "'metadata' must be a list"),
        (message(images=["zzz"] * 3), 400, "images[0] is not the base64 text"),
        (message(images=[bomb(20_000, 20_000)] * 3), 400, "20000 x 20000"),
        (message().replace(b"{}", b'{"a": NaN}', 1), 400, "NaN is not JSON"),
    ],
    ids=range(14),
)
def test_garbage_is_answered_with_the_reason(serve, body, status, says):
    code, answer = raw_post(serve().url, body)
    assert code == status
    assert says in answer["error"]
    assert answer["version"] == 1


def test_other_paths_types_and_methods(serve):
    url = serve().url
    assert raw_post(url, message(), {"Content-Type": "text/plain"})[0] == 415
    assert raw_post(url + "/no", message())[0] == 404
    for method, path, status in (("PUT", "/score", 501), ("GET", "/score", 404)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(url + path, method=method), timeout=5)
        with caught.value:
            assert caught.value.code == status
            assert json.loads(caught.value.read())["error"]
    assert b"411 Length Required" in talk(url, b"POST /score HTTP/1.1\r\nContent-Type: application/json\r\n\r\n")
    assert b'"error":"Bad request' in talk(url, b"\0\0\0\0\r\n\r\n")


def talk(url, data, timeout=10.0):
    """What the server says to raw bytes until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    return answer


def test_a_request_above_the_limit_is_refused_and_the_client_is_told_what_to_do(serve):
    url = serve(max_request_mb=0.05).url
    big = torch.rand(4, 3, 512, 512, generator=torch.Generator().manual_seed(2))
    with pytest.raises(RemoteRewardError, match=r"413.*the limit is 0\.05 MB.*batch_size") as caught:
        RemoteReward(url, retries=3)(big, ("a",) * 4, ({},) * 4)
    assert (caught.value.status, caught.value.attempts) == (413, 1)


def test_the_token(process):
    for token in (None, "sesame2", "sesam"):
        with pytest.raises(RemoteRewardError, match=r"401 Unauthorized: the token is missing or wrong.*1 attempt ") as caught:
            RemoteReward(process.url, token=token, retries=3)(*BATCH)
        assert caught.value.status == 401
        assert "sesam" not in str(caught.value)
    reward = RemoteReward(process.url, token="sesame")
    assert len(reward(*BATCH)[0]) == 3
    assert "sesame" not in repr(reward) + repr(reward.client)
    assert raw_post(process.url, message(), {"Authorization": "Bearer s\xe9same"})[0] == 401


def test_the_token_comes_from_the_environment(process, monkeypatch):
    monkeypatch.setenv("RLR_REWARD_TOKEN", "sesame")
    assert len(RemoteReward(process.url)(*BATCH)[0]) == 3


def test_listening_for_others_without_a_token_is_warned_of(serve, caplog):
    serve(host="0.0.0.0", token="x")
    assert not caplog.records
    serve(host="0.0.0.0")
    assert "without a token" in caplog.text


def test_an_exception_of_the_reward_is_told_and_tried_again(serve, caplog):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        raise KeyError("answer")

    with pytest.raises(RemoteRewardError, match=r"500.*reward 'reward' raised KeyError: 'answer'.*3 attempts") as caught:
        RemoteReward(serve(reward).url, retries=2, backoff=0.01)(*BATCH)
    assert len(calls) == 3
    assert caught.value.attempts == 3
    warnings = [r.getMessage() for r in caplog.records if r.name.endswith("http_client")]
    assert [re.search(r"attempt \d of \d", text)[0] for text in warnings] == ["attempt 2 of 3", "attempt 3 of 3"]


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([1.0], r"shape \(1,\) for a batch of 3"),
        ([1, 2, float("inf")], "infinite"),
        (([1, 2, 3], {"x": object()}), r"reward metadata\['x'\] is a object"),
    ],
)
def test_a_reward_that_returns_something_else(serve, returned, says):
    with pytest.raises(RemoteRewardError, match=says):
        RemoteReward(serve(lambda *batch: returned).url, retries=0)(*BATCH)


def test_a_port_that_is_taken(serve):
    port = int(serve().url.rsplit(":", 1)[1])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1, port {port}: .*choose another port"):
        RewardServer(mean, port=port)


@pytest.mark.parametrize(
    "options",
    [{"workers": 0}, {"max_request_mb": 0}, {"token": ""}, {"token": "a\nb"}, {"receive_timeout": float("nan")}, {"port": 70000}],
)
def test_server_options_that_cannot_be(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RewardServer(mean, **({"port": 0} | options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "localhost:8000"}, "must be like http"),
        ({"url": "ftp://x"}, "must be like http"),
        ({"url": "http://user:secret@host"}, "a secret goes into token"),
        ({"url": "http://host/?x=1"}, "no user, password, query"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"retries": -1}, "retries=-1"),
        ({"retries": 1.5}, "retries=1.5"),
        ({"backoff": -1}, "backoff=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"token": "a\r\nX: y"}, "token"),
        ({"metadata_keys": "n"}, "list of keys"),
        ({"groupwise": True, "batch_size": 2}, "tear groups apart"),
    ],
)
def test_client_options_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        RemoteReward(**({"url": "http://127.0.0.1:1"} | options))


# ---- slow, late and absent ----


def test_a_slow_reward_is_given_up_and_the_next_attempt_is_served(serve):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        time.sleep(1.0 if len(calls) == 1 else 0)
        return [0] * len(prompts)

    url = serve(reward).url
    with pytest.raises(RemoteRewardError, match=r"no answer within timeout=0\.3 s \(1 attempt"):
        RemoteReward(url, timeout=0.3, retries=0)(*BATCH)
    assert RemoteReward(url, timeout=0.6, retries=6, backoff=0.1)(*BATCH)[0].tolist() == [0, 0, 0]
    assert len(calls) <= 3  # attempts that were given up while they waited for their turn cost no call


def test_nobody_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(RemoteRewardError, match=rf"http://127.0.0.1:{port}/score: no connection: .*refused.*2 attempts") as caught:
        RemoteReward(f"http://127.0.0.1:{port}", retries=1, backoff=0.01)(*BATCH)
    assert caught.value.status is None
    assert isinstance(caught.value, RewardError)


@pytest.mark.parametrize(
    "start",
    [b"POST /sc", b"POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"],
    ids=["head", "body"],
)
def test_a_client_that_stops_sending_is_let_go(serve, start):
    url = serve(receive_timeout=0.4).url
    started = time.monotonic()
    assert b"200" not in talk(url, start)
    assert time.monotonic() - started < 5
    assert len(RemoteReward(url)(*BATCH)[0]) == 3


def test_a_client_that_trickles_is_let_go(serve):
    """Each byte comes in time; the whole request does not."""
    host, port = serve(receive_timeout=0.5).url.removeprefix("http://").split(":")

    def trickle(connection):
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.05)

    started = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=5) as connection, pytest.raises(OSError, match=r"reset|[Bb]roken"):
        trickle(connection)
    assert time.monotonic() - started < 4


def test_more_connections_than_the_server_takes(serve, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    url = serve(receive_timeout=0.8).url
    host, port = url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=5) for _ in range(2)]
    try:
        time.sleep(0.2)
        assert b"503 Service Unavailable" in talk(url, b"")
        assert len(RemoteReward(url, retries=5, backoff=0.2)(*BATCH)[0]) == 3  # when the idle ones have been let go
    finally:
        for connection in idle:
            connection.close()


def test_stopping_answers_what_is_under_way_and_refuses_what_waits(serve):
    begun, release = threading.Event(), threading.Event()

    def reward(images, prompts, metadata):
        begun.set()
        release.wait(5)
        return [1] * len(prompts)

    server = serve(reward)
    client = RemoteReward(server.url, retries=0)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(client, *BATCH)
        begun.wait(5)
        second = pool.submit(client, *BATCH)
        time.sleep(0.3)
        stopped = pool.submit(server.stop, 5)
        time.sleep(0.2)
        release.set()
        assert first.result()[0].tolist() == [1, 1, 1]
        with pytest.raises(RemoteRewardError, match="503.*shutting down"):
            second.result()
        assert stopped.result() is True
    with pytest.raises(RemoteRewardError, match="no connection"):
        client(*BATCH)


# ---- the client against servers that misbehave ----


@pytest.fixture
def fake():
    """A server that answers each request with the next of a list: (status, headers, body), or bytes as they are."""
    started = []

    def start(*answers):
        left = list(answers)
        seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                seen.append((self.path, dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
                answer = left.pop(0)
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_port}", seen

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


OK = json.dumps({"version": 1, "rewards": [1, 2, 3], "metadata": {}}).encode()


@pytest.mark.parametrize("status", sorted(RETRIED_STATUSES))
def test_statuses_that_are_tried_again(fake, status):
    url, seen = fake((status, {"Content-Length": "0"}, b""), (200, {}, OK))
    assert RemoteReward(url, backoff=0.01)(*BATCH)[0].tolist() == [1, 2, 3]
    assert len(seen) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 415, 422, 501])
def test_statuses_that_are_final(fake, status):
    url, seen = fake((status, {}, b"<html>why\n not</html>"))
    with pytest.raises(RemoteRewardError, match=rf"answered {status} .*why not"):
        RemoteReward(url, backoff=0.01)(*BATCH)
    assert len(seen) == 1


def test_a_redirection_is_not_followed(fake):
    other, other_seen = fake((200, {}, OK))
    url, _ = fake((302, {"Location": other + "/score"}, b""))
    with pytest.raises(RemoteRewardError, match="302"):
        RemoteReward(url, token="secret", retries=0)(*BATCH)
    assert not other_seen


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((200, {}, b"<html>"), "something else than JSON"),
        ((200, {}, b'{"version": 1, "rewards": [1, NaN, 2]}'), "something else than JSON"),
        ((200, {}, b"[]"), "not an answer of version 1"),
        ((200, {}, OK.replace(b"1", b"2", 1)), "not an answer of version 1"),
        ((200, {}, OK.replace(b"2, ", b"")), "must be a list of 3"),
        ((200, {}, OK.replace(b"2", b"true")), "the reward true: must be a number or null"),
        ((200, {}, OK.replace(b"2", b'"2"')), "must be a number or null"),
    ],
)
def test_answers_that_cannot_be(fake, answer, says):
    url, _ = fake(answer)
    with pytest.raises(RemoteRewardError, match=says):
        RemoteReward(url, backoff=0.01)(*BATCH)


def test_whole_numbers_become_float32(fake):
    url, _ = fake((200, {}, OK))
    assert RemoteReward(url)(*BATCH)[0].dtype == torch.float32


def test_answers_that_break_off_are_tried_again(fake):
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + OK
    url, seen = fake(cut, b"", b"nonsense\r\n\r\n", (200, {}, OK))
    assert RemoteReward(url, backoff=0.01)(*BATCH)[0].tolist() == [1, 2, 3]
    assert len(seen) == 4


def test_the_wait_doubles_with_jitter_and_obeys_retry_after(monkeypatch, fake):
    client = JsonClient("http://127.0.0.1:1", timeout=1, retries=20, backoff=0.5, token=None)
    for attempt, most in ((1, 0.5), (2, 1), (3, 2), (8, 60), (20, 60), (5000, 60)):
        delays = [client._delay(attempt, None) for _ in range(200)]
        assert most / 2 <= min(delays) < max(delays) <= most
    assert client._delay(1, 7.0) == 7
    assert client._delay(1, 1e6) == 60
    for asked in (0.0, 1.0):  # what a busy server says: all attempts must not be spent in some seconds
        assert client._delay(1, asked) >= max(0.25, asked)
        assert client._delay(6, asked) >= 8
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    url, _ = fake((429, {"Retry-After": "7"}, b""), (200, {}, OK))
    RemoteReward(url)(*BATCH)
    assert 7.0 in waits


def test_proxies_are_not_asked_for_this_machine(serve, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert len(RemoteReward(serve().url, retries=0)(*BATCH)[0]) == 3


def test_nothing_touches_the_global_random_numbers(fake):
    import random

    url, _ = fake((503, {}, b""), (200, {}, OK))
    before = random.getstate(), torch.get_rng_state()
    RemoteReward(url, backoff=0.01)(*BATCH)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


# ---- a process of its own ----


def test_many_clients_at_once_each_get_their_own_answers(process):
    reward = RemoteReward(process.url, token="sesame")

    def client(number):
        generator = torch.Generator().manual_seed(number)
        wrong = 0
        for i in range(20):
            count = 1 + (number + i) % 3
            images = torch.rand(count, 3, 16, 16, generator=generator)
            prompts = tuple("x" * (number + 1) for _ in range(count))
            rows = tuple({"n": 1000 * number + 10 * i + k} for k in range(count))
            rewards, _ = reward(images, prompts, rows)
            own = torch.tensor([float(picture.sum()) for picture in eight_bits(images)]) + number + 1
            wrong += not torch.allclose(rewards, own + torch.tensor([float(row["n"]) for row in rows]), rtol=0, atol=0.01)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(client, range(8))) == [0] * 8


def test_a_server_that_is_killed_and_comes_back(folder, caplog):
    caplog.set_level(logging.WARNING)
    first = Process(folder)
    reward = RemoteReward(first.url, timeout=5, retries=12, backoff=0.1)
    before = reward(*BATCH)
    slow = tuple(row | {"sleep": 1.5} for row in BATCH[2])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(reward, *BATCH[:2], slow)
        time.sleep(0.5)
        assert first.end(signal.SIGKILL)[0] == -signal.SIGKILL
        second = Process(folder, port=first.port)
        try:
            rewards, metadata = asked.result()
        finally:
            second.popen.kill()
            second.popen.communicate()
    assert torch.equal(rewards, before[0])
    assert metadata["pid"][0] == second.popen.pid != before[1]["pid"][0]
    assert "no connection" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_requests_under_way(folder, number):
    running = Process(folder)
    reward = RemoteReward(running.url, retries=0)
    slow = tuple(row | {"sleep": 1} for row in BATCH[2])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(reward, *BATCH[:2], slow)
        time.sleep(0.4)
        code, output, errors = running.end(number)
        assert len(asked.result()[0]) == 3
    assert (code, output) == (0, "stopped\n")
    assert "Traceback" not in errors


def test_a_training_run_with_a_remote_reward(make_trainer, process, monkeypatch):
    monkeypatch.setenv("RLR_REWARD_TOKEN", "sesame")
    rows = [{"prompt": "a handwritten digit", "n": n} for n in range(4)]
    trainer = make_trainer(reward_function=RemoteReward(process.url), train_dataset=rows, estimator="ddpo", sample_num_steps=2)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2
    assert logged[0]["reward"] == logged[0]["rewards/remote/mean"]
    assert logged[0]["reward_std"] > 0


def test_a_plan_that_needs_a_gradient_says_so_before_sampling(make_trainer, serve):
    trainer = make_trainer(reward_function=RemoteReward(serve().url))
    with pytest.raises(NonDifferentiableRewardError, match="remote"):
        trainer.train()
