"""Networks of a reward that were left in training mode: their rewards depend on chance, or on the other pictures of the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook


@contextlib.contextmanager
def layers_in_training_mode(others: Collection[nn.Module] = ()) -> Iterator[dict[str, str]]:
    """Inside, takes down the layers that run in training mode and act otherwise there: kind -> what it does.

    A hook on all modules sees them, wherever a reward function has its network from.

    Args:
        others: modules that are not the reward's, with all that is in them.
    """
    found: dict[str, str] = {}
    own = {id(module) for other in others for module in other.modules()}

    def look(module: nn.Module, inputs: object) -> None:
        what = _in_training_mode(module)
        if what is not None and id(module) not in own:
            found[type(module).__name__] = what

    handle = register_module_forward_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def _in_training_mode(module: nn.Module) -> str | None:
    """What a layer does because it runs in training mode; None where it does nothing else, or runs in evaluation mode."""
    if module.training and isinstance(module, _NormBase) and module.track_running_stats:
        return "its running statistics move with every call, and a reward depends on the other pictures of it"
    return "it drops activations at random" if module.training and isinstance(module, _DropoutNd) and module.p > 0 else None


def warning_of(found: dict[str, str], names: str) -> str:
    """What to say of such layers of the rewards called `names`."""
    listed = "; ".join(f"{kind}: {what}" for kind, what in found.items())
    return f"reward {names}: its network is in training mode ({listed}). Call .eval() on it"
