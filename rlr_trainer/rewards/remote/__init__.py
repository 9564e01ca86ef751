"""Rewards over HTTP: a client and a server. Needs the extra `remote`."""

import importlib.util

_missing = [name for name in ("fastapi", "httpx", "uvicorn") if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(f'rewards over HTTP need {", ".join(_missing)}: pip install "rlr-trainer[remote]"')
