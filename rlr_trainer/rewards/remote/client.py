"""A reward that another process computes, on this machine or another: the client of `rlr-trainer serve-reward`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.rewards.remote import encoding
from rlr_trainer.rewards.remote.encoding import SCORE_PATH, ScoreAnswer, WireError
from rlr_trainer.rewards.remote.http_client import JsonClient, RemoteRewardError
from rlr_trainer.rewards.values import merge_notes


class RemoteReward:
    """A reward `(images, prompts, metadata)` that a server computes (docs/remote_rewards.md).

    Pictures travel as PNG files with 8 bits per channel: the server sees each value rounded to the nearest of k / 255, at most
    1/510 = 0.002 away. No gradient comes back: use a plan for black-box rewards, such as estimator="ddpo" or fo_steps=0.

    Args:
        url: of the server, such as "http://127.0.0.1:8000".
        timeout: most seconds without progress in connecting, sending, waiting for the rewards, or reading them.
        retries: attempts after a first one that failed for a reason that may pass: no connection, no answer in time, a server that
            is busy or whose reward raised an exception. 8 of them bridge about two minutes.
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

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 8,
        backoff: float = 0.5,
        token: str | None = None,
        batch_size: int | None = None,
        metadata_keys: Sequence[str] | None = None,
        groupwise: bool = False,
        name: str = "remote",
    ) -> None:
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size={batch_size!r}: must be a whole number of at least 1, or None")
        if groupwise and batch_size is not None:
            raise ValueError(f"batch_size={batch_size} with groupwise=True would tear groups apart: leave one of them out")
        if isinstance(metadata_keys, str):
            raise ValueError(f"metadata_keys={metadata_keys!r}: must be a list of keys")
        self.client = JsonClient(
            url, timeout=timeout, retries=retries, backoff=backoff, token=token or os.environ.get(encoding.TOKEN_VARIABLE) or None
        )
        self.client.url += SCORE_PATH
        self.batch_size = batch_size
        self.metadata_keys = None if metadata_keys is None else list(metadata_keys)
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
            WireError: pictures or metadata that cannot be sent; names the key.
        """
        rows = [self._row(number, row) for number, row in enumerate(metadata)]
        size = self.batch_size or max(1, len(prompts))
        parts = [slice(first, first + size) for first in range(0, len(prompts), size)]
        answers = [self._ask(images[part], list(prompts[part]), rows[part]) for part in parts]
        rewards = [torch.nan if value is None else value for answer in answers for value in answer.rewards]
        notes = merge_notes([answer.metadata for answer in answers], [len(answer.rewards) for answer in answers])
        return torch.tensor(rewards, dtype=torch.float32), notes

    def _row(self, number: int, row: Any) -> Any:
        if self.metadata_keys is not None:
            if not isinstance(row, dict):
                raise WireError(f"metadata[{number}] is a {type(row).__name__}: metadata_keys needs a dict")
            missing = [key for key in self.metadata_keys if key not in row]
            if missing:
                raise WireError(f"metadata[{number}] lacks {missing}, which metadata_keys names; it has {list(row)}")
            row = {key: row[key] for key in self.metadata_keys}
        try:
            return encoding.to_json(row, f"metadata[{number}]")
        except WireError as error:
            raise WireError(f"{self!r}: {error}; or name the keys to send in metadata_keys") from None

    def _ask(self, images: Tensor, prompts: list[str], metadata: list[Any]) -> ScoreAnswer:
        request = {
            "version": encoding.PROTOCOL_VERSION,
            "images": encoding.encode_images(images),
            "prompts": prompts,
            "metadata": metadata,
        }
        parsed = self.client.post(encoding.dump_json(request))
        try:
            answer = encoding.read_message(ScoreAnswer, parsed)
            if len(answer.rewards) != len(prompts):
                raise WireError(f"{len(answer.rewards)} rewards for {len(prompts)} pictures: must be one per picture")
        except WireError as error:
            message = f"{self.client.url}: answered with {encoding.dump_json(parsed).decode()[:120]}: {error}"
            raise RemoteRewardError(message, self.client.url, 200) from None
        return answer
