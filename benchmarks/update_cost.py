"""CPU seconds and peak memory of one update: against TRL 0.23.1's DDPOTrainer, and against what the network itself costs.

    python benchmarks/update_cost.py trl       # pairs of fresh processes, ours and TRL's in turn; needs TRL 0.23.1
    python benchmarks/update_cost.py bound     # each update beside the network, timed alone in the same minute
    python benchmarks/update_cost.py rows      # the network alone: does a call on more rows, or another memory format, cost less per row?

Seconds are `time.process_time` with one thread, memory is the largest resident set above the one at the start of the training (Linux). An
update lasts from one scoring of a rollout to the next, and the first one is left out. The bound of an update is the number of the
denoiser's evaluations times their cost: forward without a graph, and forward with backward, on the same batch.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import PartialState

from rlr_trainer import RLRConfig, RLRTrainer, digits

STEPS = 10
SKIPPED = 1  # updates at the beginning
METHODS = {"trl": {}, "ours": {}, "ours, keep": {"recompute": "keep"}}
PLANS = ("ddpo", "rlr", "rlr_black_box")


def resident_bytes() -> int:
    """Resident set of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def seven(images, prompts, metadata):
    """Log-odds of a seven, with a gradient."""
    return CLASSIFIER(images.float())[:, 7], {}


CLASSIFIER = digits.load_classifier("reward")


class Clock:
    """Called once per rollout; takes down the CPU time of every update; what `beside` does at its end is not counted."""

    def __init__(self, beside=None) -> None:
        self.seconds, self.costs, self.beside, self._left = [], [], beside, None

    def __call__(self, *arguments) -> None:
        now = time.process_time()
        if self._left is not None:
            self.seconds.append(now - self._left)
        if self.beside is not None:
            self.costs.append(self.beside())
        self._left = time.process_time()


# ---- against TRL ----


def one_run(method: str, batch: int, updates: int) -> dict[str, float]:
    """Median CPU seconds of an update, and peak memory in MB, of a training in this process."""
    import trl

    PartialState(cpu=True)
    pipeline = trl.DefaultDDPOStableDiffusionPipeline(str(digits.WEIGHTS / "pipeline"), use_lora=True)
    pipeline.set_progress_bar_config(disable=True)
    clock = Clock()

    def reward(images, prompts, metadata):  # TRL calls an image_samples_hook only where there is a tracker
        clock()
        return seven(images, prompts, metadata)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = trl.DDPOConfig(
            mixed_precision="no", num_epochs=updates + SKIPPED + 1, sample_num_steps=STEPS, sample_batch_size=batch, train_batch_size=batch,
            sample_num_batches_per_epoch=1, save_freq=10**6, logdir=folder, accelerator_kwargs={"cpu": True},
            project_kwargs={"project_dir": folder},
        )  # fmt: skip
        if method == "trl":
            trainer = trl.DDPOTrainer(config, reward, lambda: (digits.PROMPT, {}), pipeline)
        else:
            own = {"output_dir": folder, "num_log_images": 0, "check_reward": False, "disable_tqdm": True, "use_cpu": True}
            config = RLRConfig.from_trl(config, **own, **METHODS[method])
            trainer = RLRTrainer(config, reward, lambda: (digits.PROMPT, {}), pipeline)
        before = resident_bytes()
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"seconds": statistics.median(clock.seconds[SKIPPED:]), "megabytes": peak / 1e6}


def against_trl(batches: list[int], rounds: int, updates: int) -> None:
    """Ours and TRL's in turn, each in a fresh process."""
    print(
        "| batch | method | CPU s per update | of TRL's (of every pair) | peak memory, MB | of TRL's |\n|---|---|---|---|---|---|"
    )
    for batch in batches:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
        for _ in range(rounds):
            for name in METHODS:
                command = [sys.executable, __file__, "run", name, str(batch), str(updates)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
        for name, runs in found.items():
            ratios = {
                what: [run[what] / theirs[what] for run, theirs in zip(runs, found["trl"], strict=True)]
                for what in ("seconds", "megabytes")
            }
            every = ", ".join(f"{ratio:.2f}" for ratio in ratios["seconds"])
            seconds, megabytes = (statistics.median(run[what] for run in runs) for what in ("seconds", "megabytes"))
            print(
                f"| {batch} | {name} | {seconds:.3f} | {statistics.median(ratios['seconds']):.2f} ({every}) | {megabytes:.0f} | "
                f"{statistics.median(ratios['megabytes']):.2f} |",
                flush=True,
            )


# ---- against the bound ----


def network_costs(trainer, batch: int):
    """A function that times the denoiser alone on one batch: CPU seconds of a forward pass, with backward, and with that of its input."""
    rows = [trainer.parts.prompts.take(1)[0]] * batch
    chain = trainer.parts.sampler.chain(trainer.model, trainer.parts.sampler.condition(rows))
    x = chain.initial(batch, torch.Generator().manual_seed(0))
    params = list(chain.parameters().values())

    def timed(work) -> float:
        started = time.process_time()
        for _ in range(3):
            work()
        return (time.process_time() - started) / 3

    def both(step: int, needs_input: bool) -> None:
        start = x.detach().requires_grad_(needs_input)
        mean, _ = chain.transition(step, start, chain.parameters())
        torch.autograd.grad(mean.sum(), [start, *params] if needs_input else params, allow_unused=True)

    def reward() -> None:
        trainer.parts.scorer.score(x, (digits.PROMPT,) * batch, ({},) * batch, "a benchmark")

    def reward_with_gradient() -> None:
        start = x.detach().requires_grad_(True)
        value = trainer.parts.scorer.differentiable((digits.PROMPT,) * batch, ({},) * batch)(start)
        torch.autograd.grad(value.sum(), start)

    def measure() -> dict[str, float]:
        with torch.no_grad():
            forward = timed(lambda: chain.transition(3, x, chain.parameters()))
        differentiable = trainer.plan.needs_differentiable_reward
        return {
            "forward": forward,
            "both": timed(lambda: both(3, False)),
            "both, input": timed(lambda: both(3, True)),
            "reward": timed(reward_with_gradient if differentiable else reward),
        }

    return measure


def bound(trainer, costs: dict[str, float], keep: bool) -> float:
    """The denoiser's evaluations of one update times their cost, in CPU seconds."""
    draw = trainer.plan.draw(1, torch.Generator().manual_seed(0), shared=True)
    visited = draw.visited_steps()
    carrying = sum(draw.carries(step) for step in visited)
    backward = carrying * costs["both, input"] + (len(visited) - carrying) * costs["both"]
    return (STEPS - len(visited) if keep else STEPS) * costs["forward"] + backward


def against_bound(batch: int, updates: int) -> None:
    """The updates of every plan, each beside the network's costs measured just before it."""
    print(
        "| plan | recompute | CPU s per update | bound, s | update / bound | decoder and reward, s | without them / bound |\n"
        + "|---" * 7
        + "|"
    )
    for name in PLANS:
        for recompute in ("recursive", "keep"):
            clock = Clock()
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                config = RLRConfig(
                    output_dir=folder, estimator=name, recompute=recompute, sample_num_steps=STEPS, sample_guidance_scale=1.0,
                    per_device_train_batch_size=batch, max_steps=updates + SKIPPED + 1, save_strategy="no", num_log_images=0,
                    check_reward=False, use_cpu=True, disable_tqdm=True,
                )  # fmt: skip
                trainer = RLRTrainer(config, lambda *a: seven(*a)[0], lambda: (digits.PROMPT, {}), digits.load_pipeline(), clock)
                clock.beside = network_costs(trainer, batch)
                trainer.train()
            pairs = list(zip(clock.seconds, clock.costs, strict=False))[SKIPPED:]
            keep = recompute == "keep"
            bounds = [bound(trainer, costs, keep) for _, costs in pairs]
            ratio = statistics.median(seconds / least for (seconds, _), least in zip(pairs, bounds, strict=True))
            rest = statistics.median((s - costs["reward"]) / least for (s, costs), least in zip(pairs, bounds, strict=True))
            seconds, reward = statistics.median(s for s, _ in pairs), statistics.median(costs["reward"] for _, costs in pairs)
            print(
                f"| {name} | {recompute} | {seconds:.3f} | {statistics.median(bounds):.3f} | {ratio:.2f} | {reward:.3f} | {rest:.2f} |",
                flush=True,
            )


# ---- rows of a call ----


def per_row(sizes: tuple[int, ...] = (4, 16, 32, 128), rounds: int = 3) -> None:
    """CPU milliseconds per row of a call of the digits UNet with LoRA-sized trained weights, forward and with backward."""
    pipeline, timings = digits.load_pipeline(), {}
    states = pipeline.encode_prompt(digits.PROMPT, "cpu", 1, False)[0]
    networks = {"contiguous": pipeline.unet, "channels_last": digits.load_pipeline().unet.to(memory_format=torch.channels_last)}
    for _ in range(rounds):  # in turn, so that what else the machine does hits all alike
        for size in sizes:
            for name, unet in networks.items():
                unet.requires_grad_(False)
                trained = [p.requires_grad_(True) for key, p in unet.named_parameters() if ".to_q." in key]
                x = torch.randn(size, *(unet.config.in_channels, unet.config.sample_size, unet.config.sample_size))
                x = x.to(memory_format=torch.channels_last) if name == "channels_last" else x
                started = time.process_time()
                with torch.no_grad():
                    unet(x, 500, states.expand(size, -1, -1))
                between = time.process_time()
                torch.autograd.grad(unet(x, 500, states.expand(size, -1, -1))[0].sum(), trained)
                done = time.process_time()
                timings.setdefault((size, name), []).append(((between - started) / size, (done - between) / size))
    print("| rows | memory format | forward, ms per row | forward and backward, ms per row |\n|---|---|---|---|")
    for (size, name), values in timings.items():
        forward, both = (1e3 * statistics.median(value[i] for value in values) for i in (0, 1))
        print(f"| {size} | {name} | {forward:.2f} | {both:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("trl", "bound", "rows", "run"))
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)  # of "run": method, batch, updates
    parser.add_argument("--batch", type=int, nargs="+", default=None, help="samples per update; trl: 8 and 32, bound: 32")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs")
    parser.add_argument("--updates", type=int, default=6, help="updates that are measured in every run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if options.part == "run":
        method, batch, updates = options.rest
        print(json.dumps(one_run(method, int(batch), int(updates))))
    elif options.part == "trl":
        against_trl(options.batch or [8, 32], options.rounds, options.updates)
    elif options.part == "rows":
        per_row()
    else:
        for batch in options.batch or [32]:
            against_bound(batch, options.updates)


if __name__ == "__main__":
    main()
