"""Serving a reward function over HTTP, for `RemoteReward` (docs/remote_rewards.md). The library's part of `rlr-trainer serve-reward`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hmac
import logging
import math
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import pydantic_core
import torch
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from rlr_trainer.rewards.calling import invoke
from rlr_trainer.rewards.remote import encoding
from rlr_trainer.rewards.remote.client import is_loopback
from rlr_trainer.rewards.remote.encoding import HEALTH_PATH, PROTOCOL_VERSION, SCORE_PATH, TOKEN_VARIABLE, WireError
from rlr_trainer.rewards.values import check_values, split_returned

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64  # at a time; with more, requests are answered 503, which clients take as "later"


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
        max_megapixels: of all pictures that are decoded at a time, in 10^6; each worker has an equal share, the most of one request.
        workers: calls of the function at the same time.
        receive_timeout: seconds that the body of a request may take to arrive.

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
        for name, value in (limits | {"workers": workers}).items():
            if not 0 < value < 1e9:
                raise ValueError(f"{name}={value!r}: must be a positive number")
        if not 0 <= port < 65536:
            raise ValueError(f"port={port!r}: must be from 0 to 65535; 0 takes any free one")
        if not callable(reward):
            raise TypeError(f"reward={reward!r}: must be a function (images, prompts, metadata) -> rewards")
        encoding.check_token(token)
        self.reward, self.token, self.receive_timeout = reward, token, receive_timeout
        self.name = str(getattr(reward, "__name__", None) or type(reward).__name__)
        self.max_bytes = int(max_request_mb * 10**6)
        self.max_pixels = int(max_megapixels * 10**6 / workers)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            reason = (error.strerror or str(error)).partition(" (while")[0]
            raise OSError(f"cannot listen on {host}, port {port}: {reason}; choose another port (0: any free one)") from error
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._workers = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._uvicorn = self._make_uvicorn()
        self._thread = threading.Thread(target=self._uvicorn.run, args=([self._socket],), name="reward-server", daemon=True)
        self._given_up = False
        if token is None and not is_loopback(host):
            refusal = "only requests that name this machine (localhost) are answered, yet whoever can reach it can name it"
            logger.warning("listening on %s without a token: %s; set a token (--token, or %s)", host, refusal, TOKEN_VARIABLE)

    def _make_uvicorn(self) -> uvicorn.Server:
        app = FastAPI(openapi_url=None, redirect_slashes=False, dependencies=[Depends(self._check_host)])
        app.add_api_route(HEALTH_PATH, self._health)
        app.add_api_route(SCORE_PATH, self._score, methods=["POST"])
        app.add_exception_handler(StarletteHTTPException, _refuse)
        # Connections stay open after an answer: uvicorn reads on after an early refusal, which a client that still sends would miss.
        options: dict[str, Any] = {"http": "h11", "ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
        return uvicorn.Server(uvicorn.Config(app, limit_concurrency=MAX_CONNECTIONS + 1, **options))

    def start(self) -> None:
        """Starts answering, in a thread of its own."""
        self._thread.start()

    def stop(self, grace: float = 30.0) -> bool:
        """Stops listening, and waits up to `grace` seconds for the requests whose rewards are being computed; others are answered 503.

        Returns:
            Whether all of them were answered.
        """
        self._workers.shutdown(wait=False, cancel_futures=True)
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
            rule = "a server without a token answers only to names of its own machine (localhost, 127.0.0.1, [::1])"
            raise HTTPException(403, f"the Host is {host!r:.80}: {rule}; start it with a token (--token, or {TOKEN_VARIABLE})")

    async def _health(self) -> Response:
        return JSONResponse({"version": PROTOCOL_VERSION, "status": "ok", "reward": self.name})

    async def _score(self, request: Request) -> Response:
        body = await self._receive(request)
        loop = asyncio.get_running_loop()

        def client_is_gone() -> bool:
            return asyncio.run_coroutine_threadsafe(request.is_disconnected(), loop).result()

        try:
            future = self._workers.submit(self._turn, body, client_is_gone)
        except RuntimeError as error:
            raise HTTPException(503, "the server is shutting down") from error
        try:
            return Response(await asyncio.wrap_future(future), media_type="application/json")
        except asyncio.CancelledError as error:  # by `stop`: before its turn, or by uvicorn at the end of the grace
            self._given_up = self._given_up or not future.cancelled()
            raise HTTPException(503, "the server is shutting down") from error

    async def _receive(self, request: Request) -> bytearray:
        if self.token is not None:
            given = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):  # takes as long wherever they differ
                raise HTTPException(401, "the token is missing or wrong: give the one that the server was started with (--token)")
        # Web pages may send other types to an address of this machine without asking.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "Content-Type must be application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(self.receive_timeout):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.max_bytes:
                        limit = f"the limit is {self.max_bytes / 1e6:g} MB (--max_request_mb)"
                        raise HTTPException(413, f"the request is too large: {limit}; send fewer pictures at a time (batch_size)")
        except TimeoutError:
            said = f"the request took longer than {self.receive_timeout:g} s to arrive (--receive_timeout)"
            raise HTTPException(408, said, {"Connection": "close"}) from None
        except ClientDisconnect:
            raise HTTPException(499, "the connection ended in the middle of the request") from None
        return body

    def _turn(self, body: bytearray, client_is_gone: Callable[[], bool]) -> bytes:
        if client_is_gone():
            raise HTTPException(499, "the client has gone away while it waited for its turn")
        try:
            message = encoding.read_message(encoding.ScoreRequest.model_validate_json, body)
            counts = len(message.images), len(message.prompts), len(message.metadata)
            if len(set(counts)) > 1:
                raise WireError("{} images, {} prompts and {} metadata: must be as many of each".format(*counts))
            pictures = encoding.Pictures(message.images)
            if pictures.pixels > self.max_pixels:
                found = f"'images' holds {counts[0]} entries of {pictures.size[0]} x {pictures.size[1]}"
                rule = f"the pictures of one request may have {self.max_pixels} pixels in all (--max_megapixels / --workers)"
                raise WireError(f"{found}: {rule}; send fewer per request (batch_size), or raise the limit")
            batch = pictures.decode(), tuple(message.prompts), tuple(message.metadata)
        except WireError as error:
            raise HTTPException(400, str(error)) from error
        try:
            with torch.no_grad():
                values, notes = split_returned(invoke(self.name, self.reward, batch, None))
            rewards = check_values(self.name, values, counts[0], torch.device("cpu")).tolist()
            answer = {"version": PROTOCOL_VERSION, "rewards": rewards, "metadata": notes}
            return pydantic_core.to_json(answer, inf_nan_mode="null", fallback=encoding.plain)
        except (Exception, asyncio.CancelledError, SystemExit) as error:  # whatever the function raises is told to the client
            logger.error("reward %r failed", self.name, exc_info=error)
            raise HTTPException(500, f"reward {self.name!r} raised {type(error).__name__}: {error}") from error


async def _refuse(request: Request, error: Any) -> Response:
    logger.warning("%s: answered %d: %s", request.client and request.client.host, error.status_code, error.detail)
    return JSONResponse({"version": PROTOCOL_VERSION, "error": error.detail}, error.status_code, error.headers)
