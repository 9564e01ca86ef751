"""`rlr-trainer serve-reward`."""

from __future__ import annotations

import argparse
from typing import Any

GRACE_SECONDS = 30


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the subcommand."""
    serve = commands.add_parser(
        "serve-reward",
        parents=[common],
        help="serve a reward function over HTTP, for RemoteReward",
        description="Serves one reward function over HTTP, for rlr_trainer.rewards.RemoteReward in another process or on another machine "
        "(docs/remote_rewards.md). Ctrl-C or SIGTERM finishes the requests in progress and leaves with code 0.",
        allow_abbrev=False,
    )
    serve.add_argument("reward", help="package.module:function, or the name of a built-in reward, as for train --reward")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any free one (default: 8000)")
    serve.add_argument(
        "--token",
        default=None,
        help="secret that clients must send; better given in the environment variable RLR_REWARD_TOKEN, because other users of the machine "
        "can read command lines (default: that variable, else none)",
    )
    serve.add_argument("--max_request_mb", type=float, default=64, help="largest request, in 10^6 bytes (default: 64)")
    serve.add_argument("--max_megapixels", type=float, default=100, help="10^6 pixels, shared by the workers (default: 100)")
    serve.add_argument(
        "--workers", type=int, default=1, help="calls of the function at the same time (default: 1; models on a GPU need that)"
    )
    serve.add_argument(
        "--receive_timeout", type=float, default=30, help="seconds that the body of a request may take to arrive (default: 30)"
    )
    serve.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    import contextlib
    import os
    import signal
    import sys
    import time

    from rlr_trainer.cli.settings import load_reward
    from rlr_trainer.rewards.remote.encoding import TOKEN_VARIABLE
    from rlr_trainer.rewards.remote.server import RewardServer

    limits = {name: getattr(options, name) for name in ("max_request_mb", "max_megapixels", "workers", "receive_timeout")}
    token = options.token or os.environ.get(TOKEN_VARIABLE) or None
    server = RewardServer(load_reward(options.reward), host=options.host, port=options.port, token=token, **limits)
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
        return 0
    print(f"stopped, leaving requests unanswered (the limit is {GRACE_SECONDS} s)", file=sys.stderr, flush=True)
    os._exit(1)  # the thread of a hanging reward would keep the process alive
