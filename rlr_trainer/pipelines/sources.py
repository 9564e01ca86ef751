"""Whether a folder or hub id can be there, asked in a second: the hub client tries an unreachable hub for minutes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SECONDS = 5.0  # to wait for the hub's answer


def check_source(field: str, source: str | Path, file: str, cache_dir: Any = None) -> None:
    """Refuses a source that is no folder and cannot be a hub id, and a hub id that is not in the cache while the hub is out of reach.

    Args:
        field: what messages call it.
        file: that the repository must have, to look for in the cache.

    Raises:
        ValueError: says what is missing.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    name = str(source)
    parts = name.split("/")
    if Path(source).exists():
        return
    if len(parts) != 2 or not all(parts) or Path(parts[0]).is_dir() or name.startswith(("/", ".", "~")):
        raise ValueError(f"{field}={name!r}: no such folder; give a folder that exists, or a hub id, owner/name")
    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, file, cache_dir=cache_dir), str):
        return
    if (reason := _unreachable(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)) is not None:
        raise ValueError(
            f"{field}={name!r}: no such folder, no such repository in the cache, and the hub cannot be reached ({reason}); give a folder, or "
            f"run `hf download {name}` where there is a connection and pass the folder"
        )


def _unreachable(endpoint: str) -> str | None:
    """Why the hub does not answer, or None: any answer counts, whatever its status."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=SECONDS)
    except Exception as error:  # of requests or httpx, by the version of the hub client
        return f"{type(error).__name__}: {error}"
    return None
