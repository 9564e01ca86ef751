"""Run by tests/test_processes.py: pairs of processes that end while gloo's threads still hold tensors. Prints how each ended."""

import os
import sys

import torch
import torch.distributed as dist

from rlr_trainer.rollouts.processes import let_gloo_finish_at_exit


def leave_operations_behind(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if sys.argv[2] == "waiting":
        let_gloo_finish_at_exit()
    for _ in range(60):
        dist.all_reduce(torch.ones(3), async_op=True)


def ends(store):
    pair = []
    for rank in (0, 1):
        if not (process := os.fork()):
            leave_operations_behind(rank, store)
            sys.exit()
        pair.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in pair]


if __name__ == "__main__":
    print([ends(os.path.join(sys.argv[1], str(number))) for number in range(8)], flush=True)
