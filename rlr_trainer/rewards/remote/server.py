"""Serving a reward function over HTTP, for `RemoteReward` (docs/remote_rewards.md). The library's part of `rlr-trainer serve-reward`."""

from __future__ import annotations

import concurrent.futures
import hmac
import http.server
import logging
import math
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from rlr_trainer.rewards.calling import invoke
from rlr_trainer.rewards.remote.encoding import (
    HEALTH_PATH,
    PROTOCOL_VERSION,
    SCORE_PATH,
    TOKEN_VARIABLE,
    WireError,
    check_token,
    dump_json,
    read_request,
    to_json,
)
from rlr_trainer.rewards.remote.http_client import is_loopback
from rlr_trainer.rewards.values import check_values, split_returned

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64  # at a time; one more is answered 503, which clients take as "later"
DRAIN_SECONDS = 5.0  # for reading the rest of a refused request: a client still sending would not see the answer otherwise


class RewardServer:
    """Answers `POST /score` with the rewards of a function, and `GET /health`.

    Requests are received at the same time, but the function runs in `workers` threads of its own, one by default: models on a GPU
    are seldom safe to call from several threads.

    Args:
        reward: `(images, prompts, metadata) -> rewards` or `-> (rewards, reward_metadata)`; may be an `async def`.
        host: address to listen on; that of this machine alone by default.
        port: 0 takes any free one, see `url`.
        token: that clients must send; None lets everybody in who can reach the address.
        max_request_mb: largest request, in 10^6 bytes. A picture of 512 x 512 pixels takes 1.05 at most.
        max_megapixels: of all pictures of one request together, in 10^6.
        workers: calls of the function at the same time.
        receive_timeout: seconds that a request may take to arrive.

    Raises:
        ValueError: a value outside its range.
        OSError: the address cannot be listened on.
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        max_request_mb: float = 64,
        max_megapixels: float = 100,
        workers: int = 1,
        receive_timeout: float = 30,
    ) -> None:
        for name, value in (
            ("max_request_mb", max_request_mb),
            ("max_megapixels", max_megapixels),
            ("receive_timeout", receive_timeout),
        ):
            if not 0 < value < 1e9:
                raise ValueError(f"{name}={value!r}: must be a positive number")
        if workers < 1 or not 0 <= port < 65536:
            raise ValueError(f"workers={workers!r}, port={port!r}: must be at least 1, and from 0 to 65535")
        check_token(token)
        if not callable(reward):
            raise TypeError(f"reward={reward!r}: must be a function (images, prompts, metadata) -> rewards")
        self.reward = reward
        self.name = str(getattr(reward, "__name__", None) or type(reward).__name__)
        self.token = token
        self.max_bytes = int(max_request_mb * 10**6)
        self.max_pixels = int(max_megapixels * 10**6)
        self.receive_timeout = receive_timeout
        try:
            self._http = _HttpServer(host, port, self)
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another port (0: any free one)"
            ) from error
        self._executor = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._thread: threading.Thread | None = None
        if token is None and not is_loopback(host):
            logger.warning(
                "listening on %s without a token: whoever can reach it can use the reward; set a token (--token, or %s)",
                host,
                TOKEN_VARIABLE,
            )

    @property
    def url(self) -> str:
        """Where clients find it."""
        host, port = str(self._http.server_address[0]), self._http.server_address[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Starts answering, in a thread of its own."""
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, name="reward-server", daemon=True
        )
        self._thread.start()

    def stop(self, grace: float = 30.0) -> bool:
        """Stops listening, and waits up to `grace` seconds for the requests whose rewards are being computed; others are answered 503.

        Returns:
            Whether all of them were answered.
        """
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()
        self._http.give_up_receiving(always=True)
        self._executor.shutdown(wait=False, cancel_futures=True)
        return self._http.wait_for_handlers(grace)

    def __enter__(self) -> RewardServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def score(self, body: bytes, wanted: Callable[[], bool]) -> bytes:
        """The answer to a request's body; `wanted` says whether the client still waits when its turn has come.

        Raises:
            Refusal: with the status and the reason.
        """
        try:
            images, prompts, metadata = read_request(body, self.max_pixels)
        except WireError as error:
            raise Refusal(400, str(error)) from error

        def turn() -> tuple[list[float], Any]:
            if not wanted():
                raise Refusal(499, "the client has gone away while it waited for its turn")
            with torch.no_grad():
                values, notes = split_returned(invoke(self.name, self.reward, (images, prompts, metadata), None))
                return check_values(self.name, values, len(prompts), torch.device("cpu")).tolist(), notes

        try:
            values, notes = self._executor.submit(turn).result()
        except Refusal:
            raise
        except (concurrent.futures.CancelledError, RuntimeError) as error:
            if self._http.closing:
                raise Refusal(503, "the server is shutting down") from error
            raise self._reward_failed(error) from error
        except Exception as error:  # whatever the user's function raises is told to the client
            raise self._reward_failed(error) from error
        try:
            notes = to_json(notes, "reward metadata", nan_as_null=True)
        except WireError as error:
            raise self._reward_failed(error) from error
        rewards = [None if math.isnan(value) else value for value in values]
        return dump_json({"version": PROTOCOL_VERSION, "rewards": rewards, "metadata": notes})

    def _reward_failed(self, error: Exception) -> Refusal:
        logger.error("reward %r failed", self.name, exc_info=error)
        return Refusal(500, f"reward {self.name!r} raised {type(error).__name__}: {error}")


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _HttpServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    block_on_close = False  # `wait_for_handlers` has a limit
    request_queue_size = 128

    def __init__(self, host: str, port: int, owner: RewardServer) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.owner = owner
        self.closing = False
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._changed = threading.Condition()
        self._handlers = 0
        self._receiving: dict[socket.socket, float] = {}  # connection -> until when its request must be there
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks the name up, which can take long
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self._turn_away(request)
            return
        with self._changed:
            self._handlers += 1
            self._receiving[request] = time.monotonic() + self.owner.receive_timeout
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self._finished(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._finished(request)

    def _finished(self, request: Any) -> None:
        self._slots.release()
        with self._changed:
            self._handlers -= 1
            self._receiving.pop(request, None)
            self._changed.notify_all()

    def _turn_away(self, request: Any) -> None:
        try:
            request.settimeout(1)
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        except OSError:
            logger.info("a connection above %d has gone before it was turned away", MAX_CONNECTIONS)
        self.shutdown_request(request)

    def service_actions(self) -> None:
        self.give_up_receiving()

    def received(self, request: Any) -> None:
        """The request is there: its time limit no longer applies."""
        with self._changed:
            self._receiving.pop(request, None)

    def give_up_receiving(self, always: bool = False) -> None:
        """Closes connections whose request is late, or all that are still receiving."""
        self.closing = self.closing or always
        now = time.monotonic()
        with self._changed:
            late = [request for request, deadline in self._receiving.items() if always or deadline < now]
            for request in late:
                del self._receiving[request]
        for request in late:
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:
                logger.debug("a late connection was closed already")

    def wait_for_handlers(self, grace: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._handlers == 0, grace)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.info("connection of %s ended early", client_address, exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _HttpServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.owner.receive_timeout)  # of a single read or write

    def version_string(self) -> str:
        """The Server header, without Python's version."""
        return "rlr-trainer"

    def do_GET(self) -> None:
        if self.path != HEALTH_PATH:
            self._answer(404, _error(f"no such path; there are GET {HEALTH_PATH} and POST {SCORE_PATH}"))
            return
        self._answer(200, dump_json({"version": PROTOCOL_VERSION, "status": "ok", "reward": self.server.owner.name}))

    def do_POST(self) -> None:
        try:
            body = self._receive()
            self.server.received(self.connection)
            answer = self.server.owner.score(body, self._client_waits)
        except Refusal as refusal:
            logger.warning("%s: answered %d: %s", self.client_address[0], refusal.status, refusal)
            self._answer(refusal.status, _error(str(refusal)))
            if refusal.status in (401, 404, 411, 413, 415):
                self._drain()
        else:
            self._answer(200, answer)

    def _receive(self) -> bytes:
        """The body, after the checks that need none."""
        if self.path != SCORE_PATH:
            raise Refusal(404, f"no such path; there are GET {HEALTH_PATH} and POST {SCORE_PATH}")
        token = self.server.owner.token
        if token is not None:
            given = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, f"Bearer {token}".encode()):  # takes as long wherever they differ
                raise Refusal(401, "the token is missing or wrong (Authorization: Bearer <token>)")
        # Web pages may send other types to an address of this machine without asking.
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "Content-Type must be application/json")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise Refusal(411, "Content-Length is needed")
        if len(length) > 15 or int(length) > self.server.owner.max_bytes:
            limit = self.server.owner.max_bytes / 1e6
            raise Refusal(413, f"the request has {length[:15]} bytes: the limit is {limit:g} MB (--max_request_mb)")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError("the connection ended in the middle of the request")
        return body

    def _client_waits(self) -> bool:
        """False when the client has closed the connection, as after its time limit."""
        self.connection.settimeout(0)
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True  # open, and nothing more to read
        except OSError:
            return False
        finally:
            self.connection.settimeout(self.server.owner.receive_timeout)

    def _answer(self, status: int, body: bytes) -> None:
        self.close_connection = True
        self.send_response(status, "Client Closed Request" if status == 499 else None)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def _drain(self) -> None:
        """Reads on for a while: closing a connection with unread data would tear the answer out of the client's hands."""
        deadline = time.monotonic() + DRAIN_SECONDS
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1)
        while time.monotonic() < deadline and self.rfile.read1(1 << 20):
            continue

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The errors that the base class finds, in the protocol's form."""
        self._answer(code, _error(message or explain or "bad request"))

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s: %r", self.client_address[0], format % args)


def _error(message: str) -> bytes:
    return dump_json({"version": PROTOCOL_VERSION, "error": message})
