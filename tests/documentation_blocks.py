"""Runs programs in processes of their own, forked from one that has the large libraries imported (multiprocessing's forkserver).

The package itself is not imported there: every program imports it anew.
"""

import multiprocessing
import os
import sys
import types
from pathlib import Path

# What takes an interpreter its seconds; the server passes over those that an older version does not have.
LIBRARIES = [
    "torch",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.trainer",
    "peft",
    "datasets",
    "trl",
    "matplotlib.pyplot",
]
TIMEOUT = 300  # seconds


def run_program(code: str, folder: Path) -> tuple[int | None, str]:
    """Runs `code` as `python -c` would, in `folder`.

    Returns:
        The exit code (None if it took longer than `TIMEOUT`, and was ended) and what it wrote, output and errors together.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    output = folder / ".output"
    process = context.Process(target=_main, args=(code, str(folder), str(output)))
    process.start()
    process.join(TIMEOUT)
    exit_code = process.exitcode
    process.kill()
    process.join()
    return exit_code, output.read_text() if output.exists() else ""


def _main(code: str, folder: str, output: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    sys.argv = ["-c"]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)
