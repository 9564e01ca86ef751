"""Asking a JSON endpoint over HTTP: time limits, and retries with exponential backoff. For `RemoteReward` and `QuestionReward`."""

from __future__ import annotations

import functools
import ipaddress
import json
import logging
import random
import ssl
import threading
import time
from typing import Any

import httpx
import tenacity

from rlr_trainer.rewards.remote.encoding import WireError, check_token, load_json
from rlr_trainer.rewards.values import RewardError

logger = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})  # may be another the next time; any other is final
MAX_DELAY = 60.0  # seconds between two attempts
REMEDIES = {
    401: "; give the token that the server was started with",
    403: "; check the token",
    404: "; check the path of the url",
    413: "; send fewer pictures per request (batch_size), or raise the server's limit",
}


class RemoteRewardError(RewardError):
    """An endpoint did not answer, or not with what it must.

    Attributes:
        url: the endpoint's.
        status: HTTP status of the last attempt; None if there was no answer.
        attempts: how many there were.
    """

    def __init__(self, message: str, url: str, status: int | None = None, attempts: int = 1) -> None:
        super().__init__(message)
        self.url, self.status, self.attempts = url, status, attempts


class _MayPass(RemoteRewardError):
    """A failure that another attempt may not meet, `wait` seconds later at the earliest."""

    wait = 0.0


class JsonClient:
    """Posts JSON to one endpoint.

    An attempt that fails for a reason that may pass (no connection, no answer in time, one of `RETRIED_STATUSES`) is followed by
    another, after `backoff * 2^i` seconds, i = 0, 1, ..., times a random factor between 0.5 and 1 so that several processes do not
    come back at once; not before the `Retry-After` (in seconds) that the endpoint asks for; never after more than a minute.

    Args:
        url: of the endpoint, http or https. Proxies are taken from the environment, except for addresses of this machine.
            Redirections are not followed: they would carry the token elsewhere.
        timeout: most seconds without progress in connecting, sending, waiting for the answer, or reading it.
        retries: attempts after the first.
        backoff: seconds before the first of them.
        token: sent as `Authorization: Bearer <token>`.

    Raises:
        ValueError: a value outside its range, or no URL.
    """

    def __init__(self, url: str, *, timeout: float, retries: int, backoff: float, token: str | None) -> None:
        self.url = check_url(url)
        for name, value, positive in (("timeout", timeout, True), ("backoff", backoff, False)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < 1e9 or (positive and not value):
                raise ValueError(f"{name}={value!r}: must be a {'positive ' if positive else ''}number of seconds")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries={retries!r}: must be a whole number, 0 for a single attempt")
        check_token(token)
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._token = token
        self._random = random.Random()  # its own: the global one may make the prompts

    def post(self, body: bytes, stop: threading.Event | None = None) -> Any:
        """The parsed answer to `body`.

        Args:
            body: JSON.
            stop: when set, no further attempt is made.

        Raises:
            RemoteRewardError: names URL, status, attempts, and what the endpoint said.
        """
        stop = stop or threading.Event()
        started = time.monotonic()
        attempts = 0

        def attempt() -> Any:
            nonlocal attempts
            attempts += 1
            return self._attempt(body)

        def pause(state: Any) -> None:
            failure, delay = state.outcome.exception(), state.upcoming_sleep
            logger.warning("%s: %s; attempt %d of %d in %.1f s", self.url, failure, attempts + 1, self.retries + 1, delay)
            if stop.wait(delay):
                raise failure

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_MayPass),
            stop=tenacity.stop_after_attempt(self.retries + 1) | tenacity.stop_when_event_set(stop),
            wait=self._delay,
            before_sleep=pause,
            sleep=lambda seconds: None,  # `pause` has waited: `sleep` could not give up
            reraise=True,
        )
        try:
            return retrying(attempt)
        except RemoteRewardError as failure:
            tried = f"{attempts} attempt{'s' if attempts > 1 else ''} in {time.monotonic() - started:.1f} s"
            message = f"{self.url}: {failure} ({tried}, {len(body) / 1e6:.2f} MB sent){REMEDIES.get(failure.status or 0, '')}"
            raise RemoteRewardError(message, self.url, failure.status, attempts) from failure.__cause__

    def _delay(self, state: Any) -> float:
        own = tenacity.wait_exponential(self.backoff, max=MAX_DELAY)(state) * self._random.uniform(0.5, 1)
        return min(max(own, state.outcome.exception().wait), MAX_DELAY)

    def _attempt(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "rlr-trainer"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        environment = not is_loopback(httpx.URL(self.url).host)  # where proxies are named
        try:
            with httpx.Client(timeout=self.timeout, trust_env=environment, verify=_tls()) as client:
                response = client.post(self.url, content=body, headers=headers)
        except httpx.TimeoutException as error:
            raise _MayPass(f"no answer within timeout={self.timeout:g} s", self.url) from error
        except httpx.RequestError as error:
            kind = RemoteRewardError if "CERTIFICATE_VERIFY_FAILED" in str(error) else _MayPass
            raise kind(f"no connection: {str(error) or repr(error)}", self.url) from error
        if not response.is_success:
            raise self._refused(response)
        try:
            return load_json(response.content)
        except WireError as error:
            raise RemoteRewardError(
                f"answered with something else than JSON: {error}: {response.content[:120]!r}", self.url
            ) from error

    def _refused(self, response: httpx.Response) -> RemoteRewardError:
        status, said, wait = response.status_code, _message_in(response.text), response.headers.get("Retry-After", "")
        kind = _MayPass if status in RETRIED_STATUSES else RemoteRewardError
        error = kind(f"answered {status} {response.reason_phrase}{': ' + said if said else ''}", self.url, status)
        if isinstance(error, _MayPass) and wait.isascii() and wait.isdigit():
            error.wait = float(wait)
        return error


def check_url(url: str) -> str:
    """`url` without a trailing slash.

    Raises:
        ValueError: no http or https URL, or one with a password, a query or a fragment.
    """
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parts = httpx.URL("")
    if parts.scheme not in ("http", "https") or not parts.host or " " in url:
        raise ValueError(f"url={url!r}: must be like http://host:8000 or https://host/path")
    if parts.userinfo or parts.query or parts.fragment:
        raise ValueError("url: must have no user, password, query or fragment; a secret goes into token")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether the host's name or address is one of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # the system's certificates; reading them takes a while


def _message_in(text: str) -> str:
    """What an error's body says: {"error": "..."} of a reward server, {"error": {"message": "..."}} of a chat endpoint, or its text."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return " ".join(text.split())[:300]
    said = message.get("error", message) if isinstance(message, dict) else message
    said = said.get("message", said) if isinstance(said, dict) else said
    return str(said)[:2000]
