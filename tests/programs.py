"""Starting other interpreters: one, or several under torchrun."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def environment(*folders):
    """The present one, with this checkout, the tests' helpers and `folders` importable, and one thread a process."""
    paths = [TESTS.parent, *folders, TESTS, os.environ.get("PYTHONPATH")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)}


def torchrun(processes, script, *arguments):
    """The command; the port is a free one."""
    rendezvous = ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *rendezvous]
    return [*launcher, str(script), *map(str, arguments)]
