"""Rewards that another process computes: the client of `rlr-trainer serve-reward`, and the JSON client that it is made of."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import logging
import os
import random
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import torch
from torch import Tensor

from rlr_trainer.rewards.remote import encoding
from rlr_trainer.rewards.remote.encoding import SCORE_PATH, ScoreAnswer, WireError
from rlr_trainer.rewards.values import RewardError, merge_notes

logger = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})  # may be another the next time; any other is final
RETRIES = 8
FIRST_RETRIES = 2  # where nothing listens and nothing ever has: rather a wrong address than a server that is restarted
MAX_DELAY = 60.0  # seconds between two attempts
_tls = functools.cache(ssl.create_default_context)  # the system's certificates; reading them takes a while


class RemoteRewardError(RewardError):
    """An endpoint did not answer, or not with what it must.

    Attributes:
        url: the endpoint's.
        status: HTTP status of the last attempt; None if there was no answer.
        attempts: how many there were.
    """

    retry_after = 0.0  # seconds that the endpoint asks to wait

    def __init__(self, message: str, url: str, status: int | None = None, attempts: int = 1) -> None:
        super().__init__(message)
        self.url, self.status, self.attempts = url, status, attempts


class _MayPass(RemoteRewardError):
    """A failure that another attempt may not meet."""


class _NoConnection(_MayPass):
    """Nothing listens there."""


class JsonClient:
    """Posts JSON to one endpoint, with the arguments of `RemoteReward`.

    An attempt that fails for a reason that may pass is followed by another, after `backoff * 2^i` seconds, i = 0, 1, ..., times a
    random factor between 0.5 and 1 so that several processes do not come back at once; not before the `Retry-After` (in seconds)
    that the endpoint asks for; never after more than a minute. Proxies are taken from the environment, except for addresses of this
    machine. Redirections are not followed: they would carry the token elsewhere.
    """

    def __init__(self, url: str, *, timeout: float, retries: int | None, backoff: float, token: str | None) -> None:
        self._patient = retries is not None  # also with an endpoint that has never answered
        retries = RETRIES if retries is None else retries
        for name, value, least in (("timeout", timeout, 1e-3), ("retries", retries, 0), ("backoff", backoff, 0)):
            if not least <= value < 1e9:
                raise ValueError(f"{name}={value!r}: must be at least {least:g}, and finite")
        encoding.check_token(token)
        try:
            parts = httpx.URL(url)
        except (httpx.InvalidURL, TypeError):
            parts = httpx.URL("")
        if parts.userinfo or parts.query or parts.fragment:  # not shown, because it may be a secret
            raise ValueError("url: must have no user, password, query or fragment; a secret goes into token")
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ValueError(f"url={url!r}: must be like http://host:8000 or https://host/path")
        self.url = url.rstrip("/")
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._token = token
        self._random = random.Random()  # its own: the global one may make the prompts

    def post(self, body: bytes, stop: threading.Event | None = None) -> Any:
        """The parsed answer to a body of JSON; no further attempt is made when `stop` is set.

        Raises:
            RemoteRewardError: names URL, status, attempts, and what the endpoint said.
        """
        stop = stop or threading.Event()
        attempt, delay = 0, self.backoff
        while True:
            attempt += 1
            try:
                answer = self._attempt(body)
                self._patient = True
                return answer
            except RemoteRewardError as failure:
                patient = self._patient or not isinstance(failure, _NoConnection)
                retries = self.retries if patient else min(self.retries, FIRST_RETRIES)
                message = f"{self.url}: {failure} (attempt {attempt} of {retries + 1}, {len(body) / 1e6:.2f} MB sent)"
                last = not isinstance(failure, _MayPass) or attempt > retries
                if last and not patient:
                    message += "; nothing has answered there yet: check the URL and start the server, or wait longer with retries=8"
                pause = min(max(delay * self._random.uniform(0.5, 1), failure.retry_after), MAX_DELAY)
                if not last:
                    logger.warning("%s; the next one in %.1f s", message, pause)
                if last or stop.wait(pause):
                    raise RemoteRewardError(message, self.url, failure.status, attempt) from failure.__cause__
            delay = min(2 * delay, MAX_DELAY)

    def _session(self) -> httpx.Client:
        return httpx.Client(trust_env=not is_loopback(httpx.URL(self.url).host), verify=_tls())

    def _attempt(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "rlr-trainer"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        late = f"no answer within timeout={self.timeout:g} s"
        with _Deadline(self.timeout) as deadline, self._session() as session:
            request = session.build_request(
                "POST", self.url, content=body, headers=headers, timeout=self.timeout, extensions={"trace": deadline.follow}
            )
            try:
                answer = session.send(request)
            except httpx.TimeoutException as error:
                raise _MayPass(late, self.url) from error
            except httpx.RequestError as error:
                failure_kind = _NoConnection if isinstance(error, httpx.ConnectError) else _MayPass
                raise failure_kind(late if deadline.passed else f"no connection: {error!r}", self.url) from error
        if deadline.passed:  # an answer whose end is that of the connection
            raise _MayPass(late, self.url)
        status, wait = answer.status_code, answer.headers.get("Retry-After", "")
        if not answer.is_success:
            kind = _MayPass if status in RETRIED_STATUSES else RemoteRewardError
            failure = kind(f"answered {status} {answer.reason_phrase}{_message_in(answer.text)}", self.url, status)
            failure.retry_after = float(wait) if wait.isascii() and wait.isdigit() else 0.0
            raise failure
        try:
            return answer.json()
        except (ValueError, RecursionError) as error:
            said = f"answered with something else than JSON ({error}): {answer.content[:120]!r}"
            raise RemoteRewardError(said, self.url, status) from error


class _Deadline:
    """Ends a request whose answer is not there `seconds` after it was sent: httpx limits every single read, and a byte now and then would
    do. httpx reports what it does to `follow`; the connection is shut down from a thread of its own.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.passed = seconds, False
        self._connection: socket.socket | None = None
        self._timer: threading.Timer | None = None

    def follow(self, event: str, info: Mapping[str, Any]) -> None:
        """Takes down a connection that was made, plain or encrypted, and begins to count when the request is sent."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._connection = info["return_value"].get_extra_info("socket")
        elif event.endswith("send_request_body.complete"):
            self._cancel()  # a proxy was asked for the connection first
            self._timer = threading.Timer(self.seconds, self._end)
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        self.passed = True
        if self._connection is not None:
            with contextlib.suppress(OSError):  # already closed
                socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def __enter__(self) -> _Deadline:
        return self

    def __exit__(self, *stopped: object) -> None:
        self._cancel()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def is_loopback(host: str) -> bool:
    """Whether the host's name or address is one of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _message_in(text: str) -> str:
    """What an error's body says: {"error": "..."} of a reward server, {"error": {"message": "..."}} of a chat endpoint, or its text."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = " ".join(text.split())[:300]
    for key in ("error", "message"):
        said = said.get(key, said) if isinstance(said, dict) else said
    return f": {str(said)[:2000]}" if said else ""


class RemoteReward:
    """A reward `(images, prompts, metadata)` that a server computes (docs/remote_rewards.md).

    Pictures travel as PNG files with 8 bits per channel: the server sees each value rounded to the nearest of k / 255, at most
    1/510 = 0.002 away. No gradient comes back: use a plan for black-box rewards, such as estimator="rlr_black_box" or fo_steps=0.

    Args:
        url: of the server, such as "http://127.0.0.1:8000".
        timeout: most seconds without progress in connecting and in sending, and from then on until the whole answer is there.
        retries: attempts after a first one that failed for a reason that may pass: no connection, no answer in time, a status such
            as 500 or 503. None: 8, which bridge one to two minutes, but 2 while nothing has ever listened at the URL.
        backoff: seconds before the second attempt; doubles with every further one, up to a minute, and is varied at random.
        token: that the server asks for; None takes that of the environment variable RLR_REWARD_TOKEN, if there is one.
        batch_size: most pictures per request; None sends a batch in one. The requests of a batch follow each other.
        metadata_keys: which keys of the metadata to send; None sends all.
        groupwise: the server's function compares the pictures of one prompt and is to get all of them at once, see
            `rlr_trainer.rewards.groupwise`.
        name: of the reward in logs.

    Raises:
        ValueError: an argument outside its range.
    """

    black_box = True

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int | None = None,
        backoff: float = 0.5,
        token: str | None = None,
        batch_size: int | None = None,
        metadata_keys: Sequence[str] | None = None,
        groupwise: bool = False,
        name: str = "remote",
    ) -> None:
        if batch_size is not None and (batch_size < 1 or groupwise):
            raise ValueError(
                f"batch_size={batch_size!r}: must be at least 1; None with groupwise=True, because it tears groups apart"
            )
        if isinstance(metadata_keys, str):
            raise ValueError(f"metadata_keys={metadata_keys!r}: must be a list of keys")
        token = token or os.environ.get(encoding.TOKEN_VARIABLE) or None
        self.client = JsonClient(url, timeout=timeout, retries=retries, backoff=backoff, token=token)
        self.client.url += SCORE_PATH
        self.batch_size = batch_size
        self.metadata_keys = metadata_keys
        self.needs_group = groupwise
        self.__name__ = name

    def __repr__(self) -> str:
        return f"RemoteReward({self.client.url.removesuffix(SCORE_PATH)!r})"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> tuple[Tensor, Any]:
        """Rewards [B] float32 on the CPU, NaN where the server gave none, and the server's metadata.

        With several requests, lists of the metadata with one entry per picture are joined; other values become a list with one entry
        per request.

        Raises:
            RemoteRewardError: no rewards, after all attempts.
            WireError: pictures or metadata that cannot be sent.
        """
        size = self.batch_size or max(1, len(prompts))
        parts = [slice(first, first + size) for first in range(0, len(prompts), size)]
        answers = [self._ask(images[part], list(prompts[part]), metadata[part]) for part in parts]
        rewards = [torch.nan if value is None else value for answer in answers for value in answer.rewards]
        notes = merge_notes([answer.metadata for answer in answers], [len(answer.rewards) for answer in answers])
        return torch.tensor(rewards, dtype=torch.float32), notes

    def _ask(self, images: Tensor, prompts: list[str], metadata: Sequence[Any]) -> ScoreAnswer:
        request = {"version": encoding.PROTOCOL_VERSION, "images": encoding.encode_images(images), "prompts": prompts}
        keys = self.metadata_keys
        try:
            rows = [row if keys is None else {key: row[key] for key in keys} for row in metadata]
            body = json.dumps({**request, "metadata": rows}, allow_nan=False, default=encoding.plain).encode("ascii")
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            remedy = "metadata_keys names what to send: each row must have it, with values that JSON has"
            raise WireError(f"{self!r}: metadata cannot be sent ({error!r}); {remedy}") from error
        parsed = self.client.post(body)
        try:
            answer = encoding.read_message(ScoreAnswer.model_validate, parsed)
            if len(answer.rewards) != len(prompts):
                raise WireError(f"{len(answer.rewards)} rewards for {len(prompts)} pictures: must be one per picture")
        except WireError as error:
            raise RemoteRewardError(f"{self.client.url}: answered with {parsed!r:.120}: {error}", self.client.url, 200) from None
        return answer
