"""CPU seconds and peak memory of one update: against TRL 0.23.1's DDPOTrainer, and against what the network itself costs.

    python benchmarks/update_cost.py trl       # fresh processes, ours and TRL's, which take one update each in turn; needs TRL 0.23.1
    python benchmarks/update_cost.py bound     # each update beside the network, timed alone in the same minute
    python benchmarks/update_cost.py rows      # the network alone: more rows per call, channels_last, torch.compile

Seconds are `time.process_time` with one thread, memory is the largest resident set above the one at the start of the training (Linux). An
update lasts from one scoring of a rollout to the next, and the first one is left out. The bound of an update is the number of the
denoiser's evaluations times their cost: forward without a graph, and forward with backward, on the same batch.
"""

import argparse
import contextlib
import io
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
METHODS = {
    "trl": {},
    "ours": {},
    "ours, keep": {"recompute": "keep"},
    "rlr_black_box": {"estimator": "rlr_black_box"},
    "rlr_black_box, keep": {"estimator": "rlr_black_box", "recompute": "keep"},
}
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


def one_run(method: str, batch: int, updates: int) -> None:
    """A training in this process, an update for every line of standard input. Prints the CPU seconds of each, then the peak memory."""
    import trl

    PartialState(cpu=True)
    pipeline = trl.DefaultDDPOStableDiffusionPipeline(str(digits.WEIGHTS / "pipeline"), use_lora=True)
    pipeline.set_progress_bar_config(disable=True)
    clock, out = Clock(lambda: (print(*clock.seconds[-1:], file=out, flush=True), sys.stdin.readline())), sys.stdout

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
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6)


def in_turn(methods: list[str], batch: int, updates: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of every update and peak memory in MB of all methods, each in a fresh process, of which one computes at a time.

    They take an update each in turn, so that what else the machine does hits all alike.
    """
    with contextlib.ExitStack() as stack:
        running = {}
        for name in methods:
            command = [sys.executable, __file__, "run", name, str(batch), str(updates)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            running[name] = stack.enter_context(subprocess.Popen(command, text=True, **pipes))
            running[name].stdout.readline()  # until it waits in its first rollout
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(updates + SKIPPED):
            for name, process in running.items():
                process.stdin.write("\n")
                process.stdin.flush()
                seconds[name].append(float(process.stdout.readline()))
        megabytes = {name: float(process.communicate("\n")[0]) for name, process in running.items()}
    return {name: values[SKIPPED:] for name, values in seconds.items()}, megabytes


def against_first(methods: list[str], batches: list[int], rounds: int, updates: int) -> None:
    """All methods, as parts of the first one: medians over pairs of updates, with their standard errors (those of means, times 1.25)."""
    first = methods[0]
    print(f"| batch | method | CPU s per update | of {first}'s | peak memory, MB | of {first}'s |\n|---|---|---|---|---|---|")
    for batch in batches:
        found = [in_turn(methods, batch, updates) for _ in range(rounds)]
        for name in methods:
            seconds, theirs = ([second for run, _ in found for second in run[method]] for method in (name, first))
            ratios = [own / other for own, other in zip(seconds, theirs, strict=True)]
            error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5
            memory = [run[name] for _, run in found]
            of_theirs = statistics.median(run[name] / run[first] for _, run in found)
            print(
                f"| {batch} | {name} | {statistics.median(seconds):.3f} | {statistics.median(ratios):.2f} ± {error:.2f} | "
                f"{statistics.median(memory):.0f} | {of_theirs:.2f} |",
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


def networks(compiled: bool) -> dict[str, torch.nn.Module]:
    """Ways to run the digits UNet, of which some weights are trained, as many as LoRA has targets."""
    found = {
        "contiguous": digits.load_pipeline().unet,
        "channels_last": digits.load_pipeline().unet.to(memory_format=torch.channels_last),
    }
    if compiled:
        found["compiled"] = digits.load_pipeline().unet
    for unet in found.values():
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(".to_q." in name)
    if compiled:
        found["compiled"].compile()
    return found


def per_row(sizes: list[int], rounds: int, compiled: bool) -> None:
    """CPU milliseconds per row of a call of the digits UNet, forward and with backward; a first call of every kind does not count."""
    states, timings = digits.load_pipeline().encode_prompt(digits.PROMPT, "cpu", 1, False)[0], {}
    ways = networks(compiled)
    for _ in range(rounds + 1):  # in turn, so that what else the machine does hits all alike
        for size in sizes:
            for name, unet in ways.items():
                x = torch.randn(size, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
                x = x.to(memory_format=torch.channels_last) if name == "channels_last" else x
                trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
                started = time.process_time()
                with torch.no_grad():
                    unet(x, 500, states.expand(size, -1, -1))
                between = time.process_time()
                torch.autograd.grad(unet(x, 500, states.expand(size, -1, -1))[0].sum(), trained)
                done = time.process_time()
                timings.setdefault((size, name), []).append(((between - started) / size, (done - between) / size))
    print("| rows | network | forward, ms per row | forward and backward, ms per row |\n|---|---|---|---|")
    for (size, name), values in timings.items():
        forward, both = (1e3 * statistics.median(value[i] for value in values[1:]) for i in (0, 1))
        print(f"| {size} | {name} | {forward:.2f} | {both:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("trl", "bound", "rows", "run"))
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)  # of "run": method, batch, updates
    parser.add_argument(
        "--batch", type=int, nargs="+", default=None, help="samples per update; trl: 8 and 32, bound: 32, rows: sizes"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="trl: what the first one is compared with"
    )
    parser.add_argument("--compile", action="store_true", help="rows: with torch.compile, too")
    parser.add_argument("--rounds", type=int, default=3, help="trl: how often each method is run; rows: calls")
    parser.add_argument("--updates", type=int, default=6, help="updates that are measured in every run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if options.part == "run":
        method, batch, updates = options.rest
        one_run(method, int(batch), int(updates))
    elif options.part == "trl":
        against_first(options.methods, options.batch or [8, 32], options.rounds, options.updates)
    elif options.part == "rows":
        per_row(options.batch or [8, 16, 32, 64, 128], options.rounds, options.compile)
    else:
        for batch in options.batch or [32]:
            against_bound(batch, options.updates)


if __name__ == "__main__":
    main()
