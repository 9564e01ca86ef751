"""Asking a JSON endpoint over HTTP: time limits, and retries with exponential backoff. For `RemoteReward` and `QuestionReward`."""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import random
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from rlr_trainer.rewards.remote.encoding import WireError, check_token, load_json
from rlr_trainer.rewards.values import RewardError

logger = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})  # may be another the next time; any other is final
MAX_DELAY = 60.0  # seconds between two attempts
MAX_ANSWER_BYTES = 64 * 10**6


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


class JsonClient:
    """Posts JSON to one endpoint.

    An attempt that fails for a reason that may pass (no connection, no answer in time, one of `RETRIED_STATUSES`) is followed by
    another, after `backoff * 2^i` seconds, i = 0, 1, ..., times a random factor between 0.5 and 1 so that several processes do not
    come back at once; not before the `Retry-After` that the endpoint asks for; never after more than a minute.

    Args:
        url: of the endpoint, http or https. Proxies are taken from the environment, except for addresses of this machine.
            Redirections are not followed: they would carry the token elsewhere.
        timeout: seconds for each of connecting, sending, waiting for the answer, and reading it.
        retries: attempts after the first.
        backoff: seconds before the first of them.
        token: sent as `Authorization: Bearer <token>`.

    Raises:
        ValueError: a value outside its range, or no URL.
    """

    def __init__(self, url: str, *, timeout: float, retries: int, backoff: float, token: str | None) -> None:
        self.url = check_url(url)
        for name, value in (("timeout", timeout), ("backoff", backoff)):
            if (
                not isinstance(value, int | float)
                or isinstance(value, bool)
                or not 0 <= value < 1e9
                or (name == "timeout" and not value)
            ):
                raise ValueError(f"{name}={value!r}: must be a {'positive ' if name == 'timeout' else ''}number of seconds")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries={retries!r}: must be a whole number, 0 for a single attempt")
        check_token(token)
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._token = token
        self._random = random.Random()  # its own: the global one may make the prompts

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r}, timeout={self.timeout}, retries={self.retries}, backoff={self.backoff})"

    def post(self, body: bytes, stop: threading.Event | None = None) -> Any:
        """The parsed answer to `body`.

        Args:
            body: JSON.
            stop: when set, no further attempt is made.

        Raises:
            RemoteRewardError: names URL, status, attempts, and what the endpoint said.
        """
        started = time.monotonic()
        attempt = 0
        while True:
            attempt += 1
            failure = self._attempt(body)
            if not isinstance(failure, _Failure):
                return failure
            if not failure.retry or attempt > self.retries or (stop is not None and stop.is_set()):
                break
            delay = self._delay(attempt, failure.retry_after)
            logger.warning("%s: %s; attempt %d of %d in %.1f s", self.url, failure.text, attempt + 1, self.retries + 1, delay)
            if stop is None:
                time.sleep(delay)
            elif stop.wait(delay):
                break
        spent = time.monotonic() - started
        tried = "1 attempt" if attempt == 1 else f"{attempt} attempts"
        message = f"{self.url}: {failure.text} ({tried} in {spent:.1f} s, {len(body) / 1e6:.2f} MB sent){_remedy(failure.status)}"
        raise RemoteRewardError(message, self.url, failure.status, attempt)

    def _delay(self, attempt: int, retry_after: float | None) -> float:
        own = min(self.backoff * 2.0 ** min(attempt - 1, 64), MAX_DELAY) * self._random.uniform(0.5, 1)
        return min(max(own, retry_after or 0.0), MAX_DELAY)

    def _attempt(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "rlr-trainer"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        try:
            with _opener(self.url).open(request, timeout=self.timeout) as response:
                answer = _read(response, self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                return _failure_of_status(error, self.timeout)
        except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
            return _failure_of_connection(error, self.timeout)
        if len(answer) > MAX_ANSWER_BYTES:
            return _Failure(f"answered with more than {MAX_ANSWER_BYTES // 10**6} MB", retry=False)
        try:
            return load_json(answer)
        except WireError as error:
            return _Failure(f"answered with something else than JSON: {error}: {answer[:120]!r}", retry=False)


class _Failure:
    def __init__(self, text: str, *, retry: bool, status: int | None = None, retry_after: float | None = None) -> None:
        self.text, self.retry, self.status, self.retry_after = text, retry, status, retry_after


def check_url(url: str) -> str:
    """`url` without a trailing slash.

    Raises:
        ValueError: no http or https URL, or one with a password, a query or a fragment.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except (ValueError, AttributeError, TypeError):
        known = False
    if not known or not url.isprintable() or " " in url:
        raise ValueError(f"url={url!r}: must be like http://host:8000 or https://host/path")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("url: must have no user, password, query or fragment; a secret goes into token")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether the host's name or address is one of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """None: the redirection is then reported as an error."""


def _opener(url: str) -> urllib.request.OpenerDirector:
    handlers: list[Any] = [_NoRedirect()]
    if is_loopback(urllib.parse.urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _read(response: Any, timeout: float) -> bytes:
    """The body, up to one byte more than `MAX_ANSWER_BYTES`; one that trickles in is given up after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    announced = response.headers.get("Content-Length", "")
    parts, size = [], 0
    while size <= MAX_ANSWER_BYTES and (part := response.read1(1 << 20)):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    if announced.isdigit() and size < min(int(announced), MAX_ANSWER_BYTES):
        raise http.client.IncompleteRead(b"".join(parts), int(announced) - size)
    return b"".join(parts)[: MAX_ANSWER_BYTES + 1]


def _failure_of_connection(error: Exception, timeout: float) -> _Failure:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return _Failure(f"no answer within timeout={timeout:g} s", retry=True)
    final = isinstance(reason, ssl.SSLCertVerificationError)
    text = str(reason) if isinstance(reason, OSError | http.client.HTTPException) and str(reason) else repr(reason)
    return _Failure(f"no connection: {text}", retry=not final)


def _failure_of_status(error: urllib.error.HTTPError, timeout: float) -> _Failure:
    try:
        said = _message_in(_read(error, timeout)[: 10**5])
    except (OSError, http.client.HTTPException):
        said = ""
    wait = error.headers.get("Retry-After", "")
    return _Failure(
        f"answered {error.code} {error.reason}{': ' + said if said else ''}",
        retry=error.code in RETRIED_STATUSES,
        status=error.code,
        retry_after=float(wait) if wait.isascii() and wait.isdigit() else None,
    )


def _message_in(body: bytes) -> str:
    """What an error's body says: {"error": "..."} of a reward server, {"error": {"message": "..."}} of a chat endpoint, or its text."""
    text = body.decode("utf-8", "replace")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return " ".join(text.split())[:300]
    said = message.get("error", message) if isinstance(message, dict) else message
    said = said.get("message", said) if isinstance(said, dict) else said
    return str(said)[:2000]


def _remedy(status: int | None) -> str:
    remedies = {
        401: "; give the token that the server was started with",
        403: "; check the token",
        404: "; check the path of the url",
        413: "; send fewer pictures per request (batch_size), or raise the server's limit",
    }
    return remedies.get(status or 0, "")
