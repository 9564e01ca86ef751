"""Messages of the library in the command line's language: `--max_steps 0` for `max_steps=0`, `prompts` for `train_dataset`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import logging
import re
import shlex

from tqdm import tqdm

# Arguments of RLRTrainer -> keys of a run.
KEYS = {
    "train_dataset": "prompts",
    "prompt_function": "prompts",
    "eval_dataset": "eval_prompts",
    "sd_pipeline": "model",
    "reward_function": "reward",
}
# What Python says in one way and the command line in another, before single options are looked at.
PHRASES = {
    "train(resume_from_checkpoint=True)": "--resume",
    "resume_from_checkpoint=True": "--resume",
    " (--overwrite)": "",
}
# Options -> flags of `rlr-trainer sample`.
OF_SAMPLE = {
    "sample_num_steps": "num_steps",
    "sample_guidance_scale": "guidance_scale",
    "sample_eta": "eta",
    "per_device_train_batch_size": "batch_size",
}
WITH_COMMAS = {"fo_steps", "ho_start", "ho_start_weights", "noise_steps", "noise_window_range", "old_policy_decay"}
_LITERAL = (
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[[^\]]*\]|\([^)]*\)|-?\d[\d_]*(?:\.\d+)?(?:e[+-]?\d+)?|True|False|None|inf|nan"""
)


def in_command_language(text: str, command: str = "") -> str:
    """A message with the names and values of options as they are written on the command line, of `command` if its flags have own names."""
    for ours, theirs in PHRASES.items():
        text = text.replace(ours, theirs)
    text = re.sub(rf"\b({'|'.join(KEYS)})\b", lambda found: KEYS[found[1]], text)
    if "=" not in text or command == "report":  # which needs none of the libraries that know the options
        return text
    text = _options().sub(lambda found: _flag(found[1], found[2]), text)
    for ours, theirs in OF_SAMPLE.items() if command == "sample" else ():
        text = re.sub(rf"--{ours}\b", f"--{theirs}", text)
    return text


class CommandFormatter(logging.Formatter):
    """Writes log records in the command line's language."""

    def format(self, record: logging.LogRecord) -> str:
        return in_command_language(super().format(record))


class CommandHandler(logging.StreamHandler):
    """Writes log records above the progress bars, in the command line's language."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(CommandFormatter("%(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)


@functools.cache
def _options() -> re.Pattern[str]:
    from rlr_trainer.training.config import RLRConfig

    names = {field.name for field in dataclasses.fields(RLRConfig)} | {"model", "reward", "prompts", "eval_prompts"}
    return re.compile(rf"(?<![\w.-])({'|'.join(sorted(names, key=len, reverse=True))})=({_LITERAL})(?!\w)")


def _flag(name: str, literal: str) -> str:
    try:
        value = ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        value = literal
    if value is True:
        return f"--{name}"
    if value is None:
        return f"{name}: null"  # only a file can say it
    if isinstance(value, list | tuple):
        words = (",".join if name in WITH_COMMAS else " ".join)(map(_word, value))
    else:
        words = _word(value)
    return f"--{name} {words}"


def _word(value: object) -> str:
    return shlex.quote(str(value)) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
