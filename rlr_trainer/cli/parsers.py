"""The arguments of every subcommand; needs neither torch nor transformers, so that `--help` is quick."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from rlr_trainer import __version__


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="rlr-trainer",
        description="Fine-tune diffusion models on a reward.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted, 143 ended by SIGTERM after a checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rlr-trainer {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    style: dict[str, Any] = {"parents": [common], "allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    made: Any = functools.partial(argparse.ArgumentParser, **style)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=made)
    for add in (_add_train, _add_demo, _add_sample, _add_diagnose, _add_estimate, _add_doctor, _add_serve_reward, _add_report):
        add(commands)
    return parser


def _of_a_run(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A command on a run that a file describes, and keys on the command line after it."""
    command.set_defaults(takes_overrides=True)
    command.add_argument("--config", help="YAML file of keys and values")
    return command


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train as a YAML file says",
        description="Trains as a YAML file says. Every key of the file can be given, or overridden, on the command line: "
        "--learning_rate 1e-4 --fo_steps 3. The keys are model, reward, prompts, eval_prompts and every option of RLRConfig; an unknown "
        "key is an error. A value means the same in both places. A list is written [1, 2] in the file and 1 2 on the command line.",
        add_help=False,
        formatter_class=argparse.HelpFormatter,
    )
    train.add_argument("-h", "--help", action="store_true", help="show this message with every option, and exit")
    _of_a_run(train)
    train.add_argument(
        "--dry_run", action="store_true", help="say what a run would take, as `rlr-trainer estimate`, and train nothing"
    )
    _memory(train, "with --dry_run: ")
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="go on from this checkpoint's folder, or without a value from the last one in output_dir",
    )
    train.set_defaults(usage=train.format_help)


def _add_demo(commands: Any) -> None:
    short = "fine-tune a bundled digits model"
    description = "Fine-tunes a bundled digits model on a reward, pictures in about a minute, and judges the result."
    add = commands.add_parser("demo", help=short, description=description).add_argument
    kinds = "Stable Diffusion 1, Stable Diffusion 3, or for clips Wan"
    add("--model", default="digits", choices=("digits", "digits-flow", "moving-digits"), help=kinds)
    add("--target", type=int, default=7, choices=range(10), help="digit that the digit reward asks for")
    direction = "in which the digit of moving-digits shall move; right, if it is not given"
    add("--direction", choices=("left", "right", "up", "down"), help=direction)
    add(
        "--reward",
        default="digit",
        choices=("digit", "ink", "compressibility"),
        help="a classifier's probability of the target, mean brightness, or the size as a JPEG file, which is a black box",
    )
    add("--estimator", help="preset plan; otherwise rlr, or rlr_black_box for the black box")
    add("--max_steps", type=int, help="updates: otherwise 40 of 32 pictures each, or 50 of 16 clips")
    add("--output_dir", default="runs/demo", help="folder for the run's files")
    add("--seed", type=int, default=0, help="seed of the run; those of the evaluation are fixed")
    add("--overwrite", action="store_true", help="allow an output_dir that holds another run")
    add("--quiet", action="store_true", help="no progress bars")


def _add_sample(commands: Any) -> None:
    short = "pictures of a base or fine-tuned model"
    description = (
        "Samples pictures as training does and writes 000.png, 001.png, ... and grid.png (videos: .gif); with --reward also rewards.json. "
        "Picture i is that of RLRTrainer.generate for the same weights, prompts and seed."
    )
    sample = commands.add_parser("sample", help=short, description=description)
    add = sample.add_argument
    add("--model", required=True, help="digits, digits-flow, moving-digits, a pipeline's folder, or a hub id")
    add("--lora", help="LoRA weights: a run's folder, one of its checkpoints, or a hub id")
    add("--prompts", required=True, nargs="+", help="prompts, or a file of them (.txt, .json, .jsonl, .csv, .parquet)")
    add("--num_images", type=int, default=1, help="pictures of each prompt")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--output_dir", default="samples", help="folder for the pictures")
    add("--overwrite", action="store_true", help="allow a folder that holds such pictures")
    add("--reward", nargs="+", help="score the pictures: as the key reward of train")
    add("--batch_size", type=int, default=8, help="pictures at a time")
    add("--use_cpu", action="store_true", help="no GPU, even if there is one")
    add = sample.add_argument_group(
        "sampling; by default as the weights were trained (their rlr_config.json), else as train does",
        argument_default=argparse.SUPPRESS,
    ).add_argument
    add("--num_steps", dest="sample_num_steps", type=int, metavar="T", help="denoising steps")
    add("--guidance_scale", dest="sample_guidance_scale", type=float, metavar="W", help="guidance weight; 1 or less: none")
    add("--sampler", help="as the option of train")
    add("--eta", dest="sample_eta", type=float, metavar="ETA", help="noise level of the sampler; 0: none")
    add("--negative_prompt", help="negative prompt")
    add("--height", type=int, help="in pixels")
    add("--width", type=int, help="in pixels")
    add("--num_frames", type=int, help="frames of a video")


def _add_diagnose(commands: Any) -> None:
    short = "measure bias, noise, time and memory of gradient estimators on a run's model and reward"
    description = (
        "Measures what each estimator would do in the run that a YAML file and overrides describe (as for train), prints a table with "
        "a recommendation, and writes diagnosis.json to output_dir. Nothing is trained."
    )
    add = _of_a_run(commands.add_parser("diagnose", help=short, description=description)).add_argument
    add("--time_limit", type=float, default=300.0, help="seconds to measure for")
    add("--num_batches", type=int, help="at most so many updates per plan; otherwise what the time allows")


def _add_estimate(commands: Any) -> None:
    short = "memory, network calls and operations of a run, from shapes alone"
    description = (
        "Says what an update of the run that a YAML file and overrides describe (as for train) would take: peak memory by part, calls of "
        "network and decoder, floating-point operations. Of a model on the hub configuration and tokenizer files alone are downloaded; no GPU "
        "is used, and nothing is trained."
    )
    _memory(_of_a_run(commands.add_parser("estimate", help=short, description=description)))


def _memory(command: argparse.ArgumentParser, when: str = "") -> None:
    text = f"{when}memory of a device in 10^9 bytes: say whether the run fits, and else settings that do"
    command.add_argument("--memory", type=float, metavar="GB", help=text)


def _add_doctor(commands: Any) -> None:
    short = "versions, devices, cache, access to the hub, and what is missing"
    description = "Prints versions, devices, cache, access to the hub, and what is missing. Works without a network, too."
    commands.add_parser("doctor", help=short, description=description)


def _add_serve_reward(commands: Any) -> None:
    short = "serve a reward function over HTTP, for RemoteReward"
    description = (
        "Serves one reward function over HTTP, for rlr_trainer.rewards.RemoteReward in another process or on another machine "
        "(docs/remote_rewards.md). Ctrl-C or SIGTERM finishes the requests in progress and leaves with code 0."
    )
    add = commands.add_parser("serve-reward", help=short, description=description).add_argument
    add("reward", help="package.module:function, or the name of a built-in reward, as for train --reward")
    add("--host", default="127.0.0.1", help="address to listen on; that of this machine alone by default")
    add("--port", type=int, default=8000, help="port to listen on, 0 for any free one")
    add("--token", help="secret that clients must send; other users can read command lines, so better set RLR_REWARD_TOKEN")
    add("--max_request_mb", type=float, default=64, help="largest request, in 10^6 bytes")
    add("--max_megapixels", type=float, default=100, help="10^6 pixels, shared by the workers")
    add("--workers", type=int, default=1, help="calls of the function at the same time; models on a GPU need 1")
    add("--receive_timeout", type=float, default=30, help="seconds that the body of a request may take to arrive")


def _add_report(commands: Any) -> None:
    short = "write one HTML page about one or several runs"
    description = (
        "Reads the folders of runs and writes one self-contained HTML page: rewards, pictures, diagnostics, settings. With several "
        "folders the runs are compared. The page opens in any browser without a network."
    )
    add = commands.add_parser("report", help=short, description=description).add_argument
    add("folders", nargs="+", metavar="RUN_DIR", help="output_dir of a run")
    add("--output", default="report.html", help="file to write")
