"""Names that scripts for other trainers pass, call or override and that have no effect here, with what takes their place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from rlr_trainer.training.option_names import CONVERTED, SAME_MEANING, meant

P = ParamSpec("P")
C = TypeVar("C", bound=type)

# Members of DDPOTrainer and AlignPropTrainer, beside the arguments of their constructor, -> what takes its place.
MEMBERS = {
    "compute_rewards": "reward_function: one function or a list, config.reward_weights, config.async_rewards",
    "step": "train(); a callback's on_step_begin and on_step_end run around every update",
    "calculate_loss": "config.estimator, clip_range and advantage; a chain of one's own goes through rlr_trainer.estimate_gradient",
    "loss": "config.estimator, clip_range and advantage; rlr_trainer.estimators.likelihood_ratio is the function",
    "_generate_samples": "generate(prompts, seed=...)",
    "_train_batched_samples": "train(); a callback's on_step_begin and on_step_end run around every update",
    "_setup_optimizer": "optimizers=(optimizer, scheduler), or create_optimizer()",
    "_config_check": "RLRConfig, which checks itself",
    "_save_model_hook": "save_model(); PipelineAdapter.save_lora and save_denoiser",
    "_load_model_hook": "train(resume_from_checkpoint=...); PipelineAdapter.load_lora and load_denoiser",
    "_save_pretrained": "save_pretrained(folder)",
    "config": "args, an RLRConfig",
    "stat_tracker": "config.advantage='per_prompt' and per_prompt_buffer_size; parts.statistics holds them",
    "neg_prompt_embed": "config.negative_prompt",
    "executor": "config.async_rewards and reward_workers",
    "first_epoch": "state.epoch",
    "num_train_timesteps": "args.rest_num_steps (None: all)",
    "trainable_layers": "policy.trainable_parameters()",
    "autocast": "accelerator.autocast()",
}
# transformers.Trainer's own that this trainer never calls.
NEVER_CALLED = {
    "compute_loss": "config.estimator: the loss of an update is made of the surrogates of its plan",
    "prediction_step": "evaluate()",
    "evaluation_loop": "evaluate()",
}
# Members of TRL's DDPOStableDiffusionPipeline that this trainer never calls.
PIPELINE_REPLACED = {
    "__call__": "a PipelineAdapter (CONTRIBUTING.md)",
    "rgb_with_grad": "a PipelineAdapter (CONTRIBUTING.md)",
    "scheduler_step": "the pipeline's scheduler, or a PipelineAdapter with a schedule of its own",
    "get_trainable_layers": "peft_config=LoraConfig(...), or config.lora_r, lora_alpha, lora_target_modules; use_lora=False trains all",
    "save_pretrained": "trainer.save_pretrained, or PipelineAdapter.save_lora",
    "save_checkpoint": "PipelineAdapter.save_lora and save_denoiser",
    "load_checkpoint": "PipelineAdapter.load_lora and load_denoiser",
    "autocast": "config.fp16, bf16",
    **dict.fromkeys(
        ("unet", "vae", "tokenizer", "text_encoder", "scheduler"), "the same part set on the diffusers pipeline itself"
    ),
}

# Arguments of the constructors of TRL's other trainers (and slips) -> this one's.
ARGUMENTS = {
    "args": "config",
    "model": "sd_pipeline",
    "pipeline": "sd_pipeline",
    "reward_funcs": "reward_function (one, or a list of them)",
    "reward_fn": "reward_function",
    "reward_weights": "config.reward_weights",
    "prompt_fn": "prompt_function",
    "dataset": "train_dataset",
    "ref_model": "config.kl_coef, with the model as it was before training",
    "compute_metrics": "eval_reward_function (one, or a list of them)",
    **dict.fromkeys(
        ("processing_class", "tokenizer", "reward_processing_classes"),
        "not needed: the pipeline brings its tokenizer, and a reward its own processor",
    ),
    "data_collator": "not needed: the rows of train_dataset reach the reward as they are",
}
# Options of transformers.TrainingArguments that would have to change what is computed, and cannot.
REFUSED_OPTIONS = {
    "label_smoothing_factor": "there are no labels",
    "neftune_noise_alpha": "there are no token embeddings that are trained",
    "auto_find_batch_size": "the batch belongs to the rollout; lower per_device_train_batch_size and raise gradient_accumulation_steps",
    "use_liger_kernel": "its kernels are those of language models",
}
# Those that say how a dataset is read or evaluated by Trainer, which this one does in its own way -> what says it here.
UNUSED_OPTIONS = {
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_accumulation_steps"), "evaluation samples sample_batch_size pictures at a time"
    ),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "evaluation has the precision of the training, bf16 or fp16"),
    **dict.fromkeys(("prediction_loss_only", "include_for_metrics", "batch_eval_metrics"), "evaluate() gives the rewards"),
    "data_seed": "seed gives the order of the prompts, too",
    **dict.fromkeys(("group_by_length", "train_sampling_strategy"), "shuffle_prompts gives the order of the prompts"),
    "dataloader_drop_last": "passes over the prompts follow each other without a gap",
    "dataloader_num_workers": "prompts are read by the process itself",
}

# Members that are found among the trainer's `parts`, -> how they are changed; the last three are DDPOTrainer's names.
OF_PARTS = dict.fromkeys(
    ("adapter", "policy", "schedule", "rewards", "eval_rewards", "prompts", "eval_prompts", "statistics", "use_lora", "plan"),
    "the argument or option of the constructor that makes it",
) | dict.fromkeys(("sd_pipeline", "prompt_fn", "reward_fn"), "another trainer with it; a reward that changes keeps its own state")
# Arguments of the constructor, and attributes of Trainer's, that are read once -> how they are changed.
READ_ONCE = dict.fromkeys(
    ("prompt_function", "reward_function", "reward_funcs", "eval_reward_function", "train_dataset", "peft_config"),
    "another trainer with it; a reward that changes keeps its own state",
) | {
    "eval_dataset": "evaluate(eval_dataset), or another trainer with it",
    "compute_metrics": ARGUMENTS["compute_metrics"],
    "data_collator": "a dataset with other rows: they reach the reward as they are",
}
SAME_AS = {"image_samples_callback": "image_samples_hook"}


def read(trainer: Any, name: str) -> Any:
    """A member that the trainer has by way of its parts, or under another name.

    Raises:
        AttributeError: there is none; says what takes its place.
    """
    parts, missing = vars(trainer).get("parts"), f"{type(trainer).__name__} has no {name!r}"
    if name in SAME_AS:
        return getattr(trainer, SAME_AS[name])
    if parts is not None and name in OF_PARTS:
        return getattr(parts, name)
    if name in MEMBERS:
        raise AttributeError(f"{missing}: TRL's trainers had it; here it is {MEMBERS[name]}")
    if parts is None:
        missing += " yet: RLRTrainer's constructor has not run; a subclass must call super().__init__(...) first"
    raise AttributeError(missing)


def check_assignment(trainer: Any, name: str) -> str:
    """The name under which a value is kept.

    Raises:
        AttributeError: an assignment that would have no effect; names the way out.
    """
    way_out = (MEMBERS | OF_PARTS).get(name)
    if "callback_handler" in vars(trainer):  # Trainer's own constructor assigns some of them, before that one
        way_out = way_out or READ_ONCE.get(name)
    if way_out is not None:
        raise AttributeError(f"{type(trainer).__name__}.{name} = ... would have no effect: use {way_out}")
    return SAME_AS.get(name, name)


def explains_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """A constructor that says, of a keyword that it does not know, what it is called here (TypeError)."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        """The constructor, after a look at the keywords."""
        unknown = {name: ARGUMENTS.get(name, "unknown") for name in kwargs if name not in known}
        if unknown:
            names = ", ".join(name for name in known if name != "self")
            raise TypeError(f"RLRTrainer has other arguments: {_listed(unknown)}. Its own are {names}")
        init(*args, **kwargs)

    return checked


def explains_options(config_class: C) -> C:
    """A config that says, of a field of TRL's configs, of a name in other programs or of a misspelt one, what it is called here (TypeError)."""
    init = vars(config_class)["__init__"]
    known = inspect.signature(init).parameters
    options = [name for name in known if name != "self"]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        _check_option_names(config_class.__name__, kwargs.keys() - known.keys(), options)
        init(self, *args, **kwargs)

    setattr(config_class, "__init__", checked)  # noqa: B010  # a type checker forbids the plain assignment
    return config_class


def _check_option_names(config_name: str, unknown: Collection[str], options: Sequence[str]) -> None:
    """Refuses the `unknown` of the names that a config was given; says which of TRL's, or of its own `options`, was meant."""
    renamed = {name: way for name, way in (SAME_MEANING | CONVERTED).items() if name in unknown}
    if renamed:
        raise TypeError(
            f"{config_name} has other options than TRL's DDPOConfig and AlignPropConfig: {_listed(renamed)}. A whole config of TRL's is "
            "converted by RLRConfig.from_trl(config)"
        )
    if unknown:
        said = "; ".join(f"unknown option {name!r}; {meant(name, options)}" for name in sorted(unknown))
        raise TypeError(f"{config_name}: {said}")


def check_options(changed: Mapping[str, Any]) -> list[str]:
    """What to say of options of TrainingArguments that were set and have no effect, one line each.

    Args:
        changed: option -> value, of those that differ from their default.

    Raises:
        ValueError: one of them would have to change what is computed.
    """
    for name in REFUSED_OPTIONS.keys() & changed.keys():
        raise ValueError(f"{name}={changed[name]!r}: has no meaning here: {REFUSED_OPTIONS[name]}; leave it out")
    return [f"{name}={changed[name]!r} has no effect: {way}" for name, way in UNUSED_OPTIONS.items() if name in changed]


def check_overrides(trainer_class: type, base: type) -> None:
    """Refuses a subclass of the trainer that overrides what is never called: it would train something else than it says.

    Raises:
        TypeError: names the methods and what to use.
    """
    own = trainer_class.__mro__[: trainer_class.__mro__.index(base)]
    if dead := _overridden(own, MEMBERS | NEVER_CALLED):
        raise TypeError(
            f"{trainer_class.__name__} overrides {', '.join(dead)}, which {base.__name__} never calls; use instead: {_listed(dead)}"
        )


def check_pipeline(pipeline: Any) -> None:
    """Refuses a subclass of TRL's DDPOStableDiffusionPipeline that overrides what is never called.

    Raises:
        TypeError: names the members and what to use.
    """
    classes = type(pipeline).__mro__
    known = ("DefaultDDPOStableDiffusionPipeline", "DDPOStableDiffusionPipeline")
    first = next((number for number, cls in enumerate(classes) if cls.__name__ in known), 0)
    if dead := _overridden(classes[:first], PIPELINE_REPLACED):
        raise TypeError(
            f"sd_pipeline is a {type(pipeline).__name__}, which overrides {', '.join(dead)}: the trainer never calls them, it samples and "
            f"saves through a PipelineAdapter. Use instead: {_listed(dead)}"
        )


def _overridden(classes: Iterable[type], table: Mapping[str, str]) -> dict[str, str]:
    return {name: way for name, way in table.items() if any(name in vars(cls) for cls in classes)}


def _listed(ways: Mapping[str, str]) -> str:
    return "; ".join(f"{name} -> {way}" for name, way in ways.items())
