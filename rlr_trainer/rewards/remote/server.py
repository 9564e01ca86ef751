"""Serving a reward function over HTTP, for `RemoteReward` (docs/remote_rewards.md). The library's part of `rlr-trainer serve-reward`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import hmac
import logging
import math
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlr_trainer.rewards.calling import invoke
from rlr_trainer.rewards.remote import encoding
from rlr_trainer.rewards.remote.encoding import HEALTH_PATH, PROTOCOL_VERSION, SCORE_PATH, TOKEN_VARIABLE, WireError
from rlr_trainer.rewards.remote.http_client import is_loopback
from rlr_trainer.rewards.values import check_values, split_returned

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64  # at a time; one more is answered 503, which clients take as "later"
DRAIN_SECONDS = 5.0  # for reading the rest of a refused request: a client still sending would not see the answer otherwise
BEFORE_THE_BODY = (401, 403, 404, 405, 411, 413, 415)  # refusals of requests whose body has not been read


class RewardServer:
    """Answers `POST /score` with the rewards of a function, and `GET /health`.

    Requests are received at the same time, but pictures are decoded and the function runs in `workers` threads, one by default: models
    on a GPU are seldom safe to call from several threads.

    Args:
        reward: `(images, prompts, metadata) -> rewards` or `-> (rewards, reward_metadata)`; may be an `async def`.
        host: address to listen on; that of this machine alone by default.
        port: 0 takes any free one, see `url`.
        token: that clients must send. Without one only requests to a name of this machine are answered (localhost, 127.0.0.1, [::1]).
        max_request_mb: largest request, in 10^6 bytes. A picture of 512 x 512 pixels takes 1.05 at most.
        max_megapixels: of all pictures that are decoded at a time, in 10^6: one request must not have more, and several wait for
            each other.
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
        limits = {"max_request_mb": max_request_mb, "max_megapixels": max_megapixels, "receive_timeout": receive_timeout}
        for name, value in limits.items():
            if not 0 < value < 1e9:
                raise ValueError(f"{name}={value!r}: must be a positive number")
        if workers < 1 or not 0 <= port < 65536:
            raise ValueError(f"workers={workers!r}, port={port!r}: must be at least 1, and from 0 to 65535")
        encoding.check_token(token)
        if not callable(reward):
            raise TypeError(f"reward={reward!r}: must be a function (images, prompts, metadata) -> rewards")
        self.reward = reward
        self.name = str(getattr(reward, "__name__", None) or type(reward).__name__)
        self.token = token
        self.max_bytes = int(max_request_mb * 10**6)
        self._pixels = _PixelBudget(int(max_megapixels * 10**6))
        try:
            self._socket = socket.create_server(
                (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
            )
        except OSError as error:
            reason = (error.strerror or str(error)).partition(" (while")[0]
            raise OSError(f"cannot listen on {host}, port {port}: {reason}; choose another port (0: any free one)") from error
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._executor = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._uvicorn = uvicorn.Server(self._config(receive_timeout))
        self._thread = threading.Thread(target=self._uvicorn.run, args=([self._socket],), name="reward-server", daemon=True)
        self._given_up = False
        if token is None and not is_loopback(host):
            logger.warning(
                "listening on %s without a token: requests that name another machine than this one (localhost, 127.0.0.1, [::1]) are "
                "refused, yet whoever can reach it can name this one; set a token (--token, or %s)",
                host,
                TOKEN_VARIABLE,
            )

    def _config(self, receive_timeout: float) -> uvicorn.Config:
        app = FastAPI(openapi_url=None, redirect_slashes=False, dependencies=[Depends(self._check_host)])
        app.add_api_route(HEALTH_PATH, self._health)
        app.add_api_route(SCORE_PATH, self._score, methods=["POST"])
        app.add_exception_handler(StarletteHTTPException, _refuse)
        return uvicorn.Config(
            app,
            http=functools.partial(_Protocol, receive_timeout=receive_timeout),  # type: ignore[arg-type]
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            headers=[("Server", "rlr-trainer"), ("Connection", "close")],
        )

    def start(self) -> None:
        """Starts answering, in a thread of its own."""
        self._thread.start()

    def stop(self, grace: float = 30.0) -> bool:
        """Stops listening, and waits up to `grace` seconds for the requests whose rewards are being computed; others are answered 503.

        Returns:
            Whether all of them were answered.
        """
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._uvicorn.config.timeout_graceful_shutdown = math.ceil(grace)
        self._uvicorn.should_exit = True
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()
        return not self._given_up

    def __enter__(self) -> RewardServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _check_host(self, request: Request) -> None:
        """A web page can have its own name resolved to this machine and then send requests here; its name is in the Host header."""
        host = request.headers.get("host", "")
        if self.token is None and not is_loopback(re.sub(r":\d*$", "", host).strip("[]")):
            raise HTTPException(
                403,
                f"the request is for the host {host!r:.80}, but a server without a token answers only to names of its own machine "
                f"(localhost, 127.0.0.1, [::1]): start it with a token (--token, or {TOKEN_VARIABLE})",
            )

    async def _health(self) -> Response:
        return _json({"version": PROTOCOL_VERSION, "status": "ok", "reward": self.name})

    async def _score(self, request: Request) -> Response:
        self._check_head(request)
        try:
            body = await request.body()
        except ClientDisconnect:
            raise HTTPException(499, "the connection ended in the middle of the request") from None
        loop = asyncio.get_running_loop()

        def client_is_gone() -> bool:
            return asyncio.run_coroutine_threadsafe(request.is_disconnected(), loop).result()

        try:
            future = self._executor.submit(self._turn, body, client_is_gone)
        except RuntimeError as error:
            raise HTTPException(503, "the server is shutting down") from error
        try:
            return _json(await asyncio.wrap_future(future))
        except asyncio.CancelledError as error:  # by `stop`: before its turn, or by uvicorn at the end of the grace
            self._given_up = self._given_up or not future.cancelled()
            raise HTTPException(503, "the server is shutting down") from error

    def _check_head(self, request: Request) -> None:
        headers = request.headers
        if self.token is not None:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):  # takes as long wherever they differ
                raise HTTPException(401, "the token is missing or wrong (Authorization: Bearer <token>)")
        # Web pages may send other types to an address of this machine without asking.
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "Content-Type must be application/json")
        if "transfer-encoding" in headers or "content-length" not in headers:
            raise HTTPException(411, "Content-Length is needed")
        if int(headers["content-length"]) > self.max_bytes:
            limit = f"the limit is {self.max_bytes / 1e6:g} MB (--max_request_mb)"
            raise HTTPException(413, f"the request has {headers['content-length']} bytes: {limit}")

    def _turn(self, body: bytes, client_is_gone: Callable[[], bool]) -> dict[str, Any]:
        """The answer to a request's body, in a worker's thread."""
        try:
            message = encoding.read_message(encoding.ScoreRequest, encoding.load_json(body))
            pictures = encoding.Pictures(message.images)
            counts = len(message.images), len(message.prompts), len(message.metadata)
            if len(set(counts)) > 1:
                raise WireError("{} images, {} prompts and {} metadata: must be as many of each".format(*counts))
            with self._pixels.hold(pictures.pixels, f"{counts[0]} entries of {pictures.width} x {pictures.height}"):
                if client_is_gone():
                    raise HTTPException(499, "the client has gone away while it waited for its turn")
                return self._rewards(pictures.decode(), tuple(message.prompts), tuple(message.metadata))
        except WireError as error:
            raise HTTPException(400, str(error)) from error
        except (MemoryError, RuntimeError) as error:  # torch's for too little memory is a RuntimeError
            raise HTTPException(503, f"the pictures cannot be decoded now: {error}") from error

    def _rewards(self, *batch: Any) -> dict[str, Any]:
        try:
            with torch.no_grad():
                values, notes = split_returned(invoke(self.name, self.reward, batch, None))
                rewards = check_values(self.name, values, len(batch[0]), torch.device("cpu")).tolist()
            notes = encoding.to_json(notes, "reward metadata", nan_as_null=True)
        except (Exception, asyncio.CancelledError, SystemExit) as error:  # whatever the function raises is told to the client
            logger.error("reward %r failed", self.name, exc_info=error)
            raise HTTPException(500, f"reward {self.name!r} raised {type(error).__name__}: {error}") from error
        return {"version": PROTOCOL_VERSION, "rewards": [None if math.isnan(r) else r for r in rewards], "metadata": notes}


class _PixelBudget:
    """How many pixels may be decoded at the same time, over all requests, which wait for each other in order."""

    def __init__(self, total: int) -> None:
        self._total = self._left = total
        self._next = threading.Lock()  # held by the one that waits: smaller ones do not overtake it for ever
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, pixels: int, what: str) -> Iterator[None]:
        if pixels > self._total:
            raise WireError(
                f"'images' holds {what}: the pictures of one request may have {self._total} pixels in all; send fewer per request "
                "(batch_size of the client), or raise --max_megapixels of the server"
            )
        with self._next, self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify()


class _Protocol(H11Protocol):
    """uvicorn's, which has no limit on connections, nor on the time until a request is there."""

    def __init__(self, *args: Any, receive_timeout: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._receive_timeout = receive_timeout

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self._receive_timeout, self._give_up_receiving)
        if len(self.connections) > MAX_CONNECTIONS:
            body = _error(f"more than {MAX_CONNECTIONS} connections")
            head = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Type: application/json\r\nConnection: close\r\n"
            transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._give_up_receiving()
        super().shutdown()

    def _give_up_receiving(self) -> None:
        if self.cycle is None or self.cycle.more_body:
            self.transport.close()


async def _refuse(request: Request, error: Any) -> Response:
    status, reason = error.status_code, error.detail
    if status in (404, 405):
        reason = f"no such path or method; there are GET {HEALTH_PATH} and POST {SCORE_PATH}"
    logger.warning("%s: answered %d: %s", request.client and request.client.host, status, reason)
    if status in BEFORE_THE_BODY:
        # Closing a connection with unread data would tear the answer out of the client's hands.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while (await request.receive()).get("more_body"):
                    continue
    return Response(_error(reason), status, {"Retry-After": "1"} if status == 503 else None, "application/json")


def _json(message: Any) -> Response:
    return Response(encoding.dump_json(message), media_type="application/json")


def _error(message: str) -> bytes:
    return encoding.dump_json({"version": PROTOCOL_VERSION, "error": message})
