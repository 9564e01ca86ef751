"""A reward that asks a vision-language model about every picture, through a chat endpoint (docs/remote_rewards.md)."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import logging
import math
import re
import string
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rlr_trainer.rewards.remote.client import JsonClient, RemoteRewardError
from rlr_trainer.rewards.remote.encoding import encode_png
from rlr_trainer.rewards.values import RewardError

logger = logging.getLogger(__name__)

CHAT_PATH = "/chat/completions"
TOP_LOGPROBS = 20  # the most that the protocol allows
_NUMBER = re.compile(r"(?<![\w.,])[-+]?\d+(?:\.\d+)?(?![\w]|[.,]\d)")
_THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)


class QuestionReward:
    """Asks a question about every picture and makes a number of the answer; needs an OpenAI-compatible endpoint, such as vLLM's.

    With answer="yes_no" the reward is P(yes) / (P(yes) + P(no)) at the first word of the answer, where the endpoint gives
    log-probabilities, and otherwise 1 for an answer that begins with yes, 0 for no. With answer="score" the model is to write one number
    in `score_range`, which is mapped to [0, 1]. An answer that cannot be read gives None: the sample is dropped and counted.

    Not differentiable. The metadata beside the rewards is `{"answers": [text, ...]}`.

    Args:
        url, model: of the API, such as "http://127.0.0.1:8000/v1" (`/chat/completions` is added), and the model's name there.
        question: template; `{prompt}` is the prompt, any other name a key of the metadata. Double braces stand for braces.
        answer: "yes_no", "score", or a function text -> float or None (None: cannot be read).
        score_range: lowest and highest score, for answer="score".
        system: system message, or None.
        logprobs: ask for log-probabilities, for "yes_no". False for an endpoint that refuses them, or a model that thinks aloud.
        request_options: fields of the request's body that replace or join temperature 0 and max_tokens 16; None leaves one out.
        concurrency: questions under way at the same time.
        timeout, retries, backoff: as for `RemoteReward`.
        token: API key; never taken from the environment.
        name: of the reward in logs.

    Raises:
        ValueError: an argument outside its range, or a template that cannot be filled in.
    """

    black_box = True

    def __init__(
        self,
        url: str,
        model: str,
        question: str = "Does this picture show: {prompt}? Answer with one word, yes or no.",
        *,
        answer: str | Callable[[str], float | None] = "yes_no",
        score_range: tuple[float, float] = (0, 10),
        system: str | None = None,
        logprobs: bool = True,
        request_options: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int | None = None,
        backoff: float = 0.5,
        token: str | None = None,
        name: str = "question",
    ) -> None:
        if not (callable(answer) or answer in ("yes_no", "score")):
            raise ValueError(f"answer={answer!r}: must be 'yes_no', 'score', or a function text -> number or None")
        if not score_range[0] < score_range[1]:
            raise ValueError(f"score_range={score_range}: must be (lowest, highest)")
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency!r}: must be at least 1")
        self.client = JsonClient(url, timeout=timeout, retries=retries, backoff=backoff, token=token)
        if not self.client.url.endswith(CHAT_PATH):
            self.client.url += CHAT_PATH
        self.model, self.question, self.system = model, question, system
        self.fields = _fields(question)
        self.answer, self.score_range = answer, score_range
        self.concurrency = concurrency
        self.options: dict[str, Any] = {"temperature": 0, "max_tokens": 16}
        if logprobs and answer == "yes_no":
            self.options |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        self.options |= request_options or {}
        self.__name__ = name

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[list[float | None], dict[str, list[str]]]:
        """Rewards and answers, one per picture of [B, 3, H, W] or video of [B, F, 3, H, W], whose frames all go into one message.

        Raises:
            RemoteRewardError: the endpoint does not answer, or not as its protocol says.
            RewardError: a key that the question needs is not in the metadata.
        """
        questions = [self._fill_in(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        bodies = [self._body(question, picture) for question, picture in zip(questions, images, strict=True)]
        choices = self._ask_all(bodies)
        # what the model wrote; the reason instead when it refused
        texts = [str(choice["message"].get("content") or choice["message"].get("refusal") or "") for choice in choices]
        rewards = [self._read(text, choice) for text, choice in zip(texts, choices, strict=True)]
        if unreadable := [text for text, reward in zip(texts, rewards, strict=True) if reward is None]:
            low, high = self.score_range
            wanted = {"yes_no": "yes or no", "score": f"one number from {low:g} to {high:g}"}
            logger.warning(
                "reward %r: %d of %d answers of %s could not be read, such as %s; they must be %s: say so in the question, or raise "
                "max_tokens (request_options) if they are cut off",
                self.__name__, len(unreadable), len(texts), self.model, [text[:80] for text in unreadable[:3]],
                wanted.get(str(self.answer), "something that the given function reads"),
            )  # fmt: skip
        return rewards, {"answers": texts}

    def _fill_in(self, prompt: str, row: Any) -> str:
        known = {**row, "prompt": prompt} if isinstance(row, dict) else {"prompt": prompt}
        missing = self.fields - known.keys()
        if missing:
            raise RewardError(
                f"reward {self.__name__!r}: the question needs {', '.join(sorted(missing))}, but the metadata of prompt {prompt!r:.60} "
                f"has {', '.join(map(str, known))}; change the template, or bring it as a column of the dataset"
            )
        return self.question.format_map(known)

    def _body(self, question: str, picture: Tensor) -> bytes:
        frames = [picture] if picture.dim() == 3 else list(picture)
        urls = ["data:image/png;base64," + base64.b64encode(encode_png(frame)).decode("ascii") for frame in frames]
        content = [{"type": "text", "text": question}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        fields = {"model": self.model, "messages": messages, **self.options}
        return json.dumps({name: value for name, value in fields.items() if value is not None}).encode("ascii")

    def _ask_all(self, bodies: Sequence[bytes]) -> list[dict[str, Any]]:
        """The first choice of each answer, in the order of the questions; the first failure in time ends the others' attempts."""
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            asked = [pool.submit(lambda body: self._first_choice(self.client.post(body, stop)), body) for body in bodies]
            try:
                for done in concurrent.futures.as_completed(asked):
                    done.result()
                return [done.result() for done in asked]
            except RemoteRewardError as error:
                if error.status in (400, 422) and "logprob" in str(error):
                    raise RemoteRewardError(f"{error}; set logprobs=False", error.url, error.status, error.attempts) from error
                raise
            finally:  # at an interrupt, too: leaving the pool waits for what is under way
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _first_choice(self, answer: Any) -> dict[str, Any]:
        try:
            choice = answer["choices"][0]
            choice["message"].get("content")
        except (LookupError, TypeError, AttributeError) as error:
            said = f"answered with {json.dumps(answer)[:200]}, which has no choices[0].message: is it a chat endpoint?"
            raise RemoteRewardError(f"{self.client.url}: {said}", self.client.url, 200) from error
        return choice

    def _read(self, text: str, choice: dict[str, Any]) -> float | None:
        if callable(self.answer):
            return self.answer(text)
        if self.answer == "score":
            return parse_score(text, *self.score_range)
        probability = yes_probability(choice.get("logprobs"))
        return parse_yes_no(text) if probability is None else probability


def _fields(template: str) -> set[str]:
    """Names in a template's braces."""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError:
        names = {""}
    if not all(re.fullmatch(r"(?!\d+$)\w+", name) for name in names):
        raise ValueError(
            f"question={template!r}: each pair of braces must be {{prompt}} or a key of the metadata; write {{{{ and }}}} for braces"
        )
    return names


def parse_yes_no(text: str) -> float | None:
    """1 for a text whose first word is yes, 0 for no, else None; a leading <think>...</think> does not count."""
    word = re.match(r"\W*(yes|no)\b", _THINKING.sub("", text), re.IGNORECASE)
    return None if word is None else float(word[1].lower() == "yes")


def parse_score(text: str, low: float, high: float) -> float | None:
    """The one number in a text ("8", "Score: 8.5", "8/10", "8 out of 10"), mapped from the range to [0, 1]; None for several, none, or
    one outside."""
    text = re.sub(rf"(?:/|\bout of\b)\s*{re.escape(f'{high:g}')}(?!\w|\.\d)", " ", _THINKING.sub("", text))
    scores = [float(number) for number in _NUMBER.findall(text)]
    return (scores[0] - low) / (high - low) if len(scores) == 1 and low <= scores[0] <= high else None


def yes_probability(logprobs: Any) -> float | None:
    """P(yes) / (P(yes) + P(no)) from a choice's `logprobs`, or None without usable ones.

    Taken at the first token that holds a letter, over all spellings ("Yes", " yes", "YES"). A word that is not listed counts as 0: its
    probability is below the smallest that is.
    """
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    for token in content if isinstance(content, list) else []:
        if not re.search(r"\w", str(token.get("token", ""))):
            continue
        listed = {str(top.get("token")): top.get("logprob") for top in [token, *(token.get("top_logprobs") or [])]}
        sums = {"yes": 0.0, "no": 0.0}
        for text, logprob in listed.items():
            word = re.sub(r"[\W_]", "", text).lower()
            if word in sums and isinstance(logprob, int | float):
                sums[word] += math.exp(logprob)
        total = sums["yes"] + sums["no"]
        return sums["yes"] / total if total > 0 else None
    return None
