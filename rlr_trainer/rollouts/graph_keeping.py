"""Whether the graphs of visited steps are kept from sampling to the update: where asked for, or where memory allows."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import StepFunction
from rlr_trainer.estimators.kept_steps import KeptSteps
from rlr_trainer.estimators.plan_draw import PlanDraw

logger = logging.getLogger(__name__)

SHARE = 0.5  # of the free memory that kept graphs may take; the rest is for decoder, reward, the backward pass and the optimizer


@dataclasses.dataclass
class GraphKeeping:
    """Whether to keep graphs: `keep` is True or False, or None to decide by memory at the first rollout.

    Attributes:
        num_batches: sampling batches per rollout, whose graphs are held at the same time.
        weights: tensors that a graph refers to and does not hold.
        free: bytes that a device has left; None is `free_bytes`.
    """

    keep: bool | None = False
    num_batches: int = 1
    weights: Callable[[], list[Tensor]] = list
    free: Callable[[torch.device], int] | None = None

    def steps_of(
        self, draw: PlanDraw, stds: tuple[float, ...], run_step: StepFunction, noise: Callable[[], Tensor]
    ) -> KeptSteps | None:
        """What keeps the graphs of a sampling batch; None where they are not kept.

        Args:
            stds: see `KeptSteps.of_draw`.
            run_step, noise: a transition, and what makes the noise [N, ...] to measure it with.
        """
        if self.keep is False:
            return None
        kept = KeptSteps.of_draw(draw, stds)
        if self.keep is None:
            x = noise()
            per_step = graph_bytes(lambda: run_step(0, x.detach().requires_grad_(True)), [x, *self.weights()])
            self.keep = self._decide(per_step, len(kept.carries), x.device)
        return kept if self.keep else None

    def _decide(self, per_step: int, steps: int, device: torch.device) -> bool:
        needed, free = per_step * steps * self.num_batches, (self.free or free_bytes)(device)
        keep = needed <= SHARE * free
        logger.warning(
            "recompute='auto': chose %s: the graphs of %d steps and %d sampling batches take %.3f GB (%.1f MB each), %s half of the %.3f GB "
            "that %s has free",
            *("keep" if keep else "recursive", steps, self.num_batches, needed / 1e9, per_step / 1e6),
            *("at most" if keep else "more than", free / 1e9, device),
        )
        return keep


def graph_bytes(run: Callable[[], object], apart: list[Tensor]) -> int:
    """Bytes of the storages that the graph of what `run` returns holds for its backward pass, those of the tensors `apart` aside."""
    known, held = {t.untyped_storage().data_ptr() for t in apart}, {}

    def pack(tensor: Tensor) -> Tensor:
        """Takes down the storage of a tensor that the graph saves."""
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage  # held here, so that no other takes its address
        return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for address, storage in held.items() if address not in known)


def free_bytes(device: torch.device) -> int:
    """Memory that a device has left: on CUDA with what torch's allocator holds unused, elsewhere the machine's within the cgroup's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil  # comes with accelerate

    return min(psutil.virtual_memory().available, _cgroup_left())


def _cgroup_left(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container's limit leaves; the largest of numbers where there is no cgroup of version 2, or no limit ("max")."""
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return sys.maxsize
