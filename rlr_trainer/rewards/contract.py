"""How a reward is called, and what is said to a function that wants to be called otherwise."""

from __future__ import annotations

import inspect
from typing import Any

CONTRACT = (
    "a reward is called with three arguments by position, reward(images, prompts, metadata): images is a float tensor [B, 3, H, W] in "
    "[0, 1], prompts and metadata are tuples of B strings and B dicts; it returns B numbers"
)
FROM_GRPO = (
    "those are GRPOTrainer's keywords. Here images take the place of completions, and the columns of the dataset, which GRPO passes as "
    "keywords, are in metadata"
)
OF_TENSORS = (
    "; pictures are a float tensor [B, 3, H, W] in [0, 1]: rlr_trainer.rewards.pil_reward, put before a function as a decorator, hands it PIL "
    "pictures, numpy_reward arrays"
)


def check_signature(name: str, function: Any) -> None:
    """Refuses a reward that cannot be called with (images, prompts, metadata) by position.

    Raises:
        TypeError: a class in place of an instance, another number of arguments, or arguments in another order; states the contract.
    """
    if inspect.isclass(function):
        raise TypeError(f"reward {name!r} is a class: pass an instance of it, {name}(...)")
    try:
        signature = inspect.signature(getattr(function, "forward", function))  # a module's __call__ takes anything
    except (TypeError, ValueError):  # of some builtins nothing is known
        return
    names = list(signature.parameters)
    if "completions" in names:
        raise TypeError(f"reward {name!r} takes {signature}: {FROM_GRPO}; {CONTRACT}")
    try:
        signature.bind(None, None, None)
    except TypeError:
        alone = len(names) == 1 and inspect.isfunction(function) and str(signature)[1] != "*" and name.isidentifier()
        way = f". Define def reward(images, prompts, metadata): return {name}(images)" if alone else ""
        raise TypeError(f"reward {name!r} takes {signature}: {CONTRACT}{way}") from None
    if names[0] in ("prompt", "prompts"):
        raise TypeError(f"reward {name!r} takes {signature}, the prompts first: {CONTRACT}")


def needs_plain_pictures(error: BaseException) -> bool:
    """Whether torch refused to take pictures with a graph out of it (`.numpy()`, `np.asarray`)."""
    return isinstance(error, RuntimeError) and "numpy() on Tensor that requires grad" in str(error)


def hint(error: BaseException) -> str:
    """What to add to the message of an error that a reward raised: something where it took a tensor for another kind of picture."""
    said = str(error).lower()
    # the second is what a picture's size[0] says of a tensor, whose size is a method
    confused = isinstance(error, AttributeError | TypeError) and ("tensor" in said or "'builtin_function_or_method'" in said)
    return OF_TENSORS if confused else ""
