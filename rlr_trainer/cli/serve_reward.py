"""`rlr-trainer serve-reward`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time

from rlr_trainer.cli import settings
from rlr_trainer.rewards.remote.encoding import TOKEN_VARIABLE
from rlr_trainer.rewards.remote.server import RewardServer

GRACE_SECONDS = 30


def serve_reward(options: argparse.Namespace) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    limits = {name: getattr(options, name) for name in ("max_request_mb", "max_megapixels", "workers", "receive_timeout")}
    token = options.token or os.environ.get(TOKEN_VARIABLE) or None
    server = RewardServer(settings.load_reward(options.reward), host=options.host, port=options.port, token=token, **limits)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    finished = False
    with contextlib.suppress(KeyboardInterrupt):  # the second signal: at once
        try:
            server.start()
            print(f"serving reward {server.name!r} on {server.url} (Ctrl-C stops)", flush=True)
            while True:
                time.sleep(1)  # sleeping for ever would keep Windows from seeing Ctrl-C
        except KeyboardInterrupt:
            finished = server.stop(GRACE_SECONDS)
    if finished:
        print("stopped", flush=True)
        return
    print(f"stopped, leaving requests unanswered (the limit is {GRACE_SECONDS} s)", file=sys.stderr, flush=True)
    os._exit(1)  # the thread of a hanging reward would keep the process alive
