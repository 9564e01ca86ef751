"""Peak memory of the backward sweep against K and against h, with recompute="recursive" and recompute="graph".

    python benchmarks/memory.py                       # a scaled-down UNet on the CPU, a few minutes
    python benchmarks/memory.py --device cuda --size sd15   # Stable Diffusion 1.5's UNet with random weights, bf16, 64x64 latents

Peak memory is that of tensors allocated while the sweep runs, above what was allocated before it: counted by torch's profiler on the CPU, by the
caching allocator on CUDA. The chain is T = 12 DDIM steps; the reward's gradient dR/dx_0 is given, so decoder and reward are not part of it.
"""

import argparse
import copy
import gc
import time

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from tqdm.auto import tqdm

from rlr_trainer.estimators import Feedback, Sweep
from rlr_trainer.estimators.chain import sample_chain
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.pipelines import Conditioning, Layout, PipelineAdapter, PipelineChain, Policy
from rlr_trainer.schedules import SamplerOptions, make_schedule

STEPS = 12
LENGTHS = (1, 2, 4, 8)


class UNetOnly(PipelineAdapter):
    """The calls of an adapter that a chain needs; there is no pipeline around the UNet."""

    def __init__(self, unet):
        super().__init__(None)
        self.unet = unet

    denoiser = frozen_modules = decoder = None
    layout = encode_prompts = decode = save_lora = load_lora = None


def make_chain(size: str, device: torch.device, batch: int):
    if size == "sd15":
        unet, width, edge = UNet2DConditionModel(cross_attention_dim=768), 768, 64
    else:
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(64, 128), layers_per_block=2, cross_attention_dim=64, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        width, edge = 64, 16
    unet.requires_grad_(False)
    unet.conv_out.weight.mul_(0.01)  # random weights predict no noise: keep the chain from running away
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    unet.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    policy = Policy(unet)
    conditioning = Conditioning(
        {"encoder_hidden_states": torch.randn(batch, 77, width, device=device, dtype=unet.dtype)}, None, 1.0
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    schedule = make_schedule(scheduler, SamplerOptions(STEPS, 1.0))
    layout, live = Layout((4, edge, edge), 8 * edge, 8 * edge), policy.trainable_parameters()
    return PipelineChain(UNetOnly(unet), policy, policy, schedule, conditioning, layout, device, live)


def peak_bytes(run, device: torch.device) -> int:
    """Highest sum of live allocations while `run` runs, above the start."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    live = peak = 0
    for event in allocations(profiled_events(run)):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def profiled_events(run) -> list:
    """What torch's profiler sees on the CPU while `run` runs, allocations included."""
    gc.collect()  # garbage of an earlier profile would be counted as freed in this one, and lower its peak
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return profile.profiler.kineto_results.events()


def allocations(events) -> list:
    """Those events that allocate or free, in the order of time."""
    return sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())


def measure(chain, rollout, plan: EstimatorPlan, mode: str, device: torch.device) -> tuple[float, float]:
    """(peak in MB, seconds) of one sweep."""
    draw = plan.draw(rollout.num_samples, torch.Generator().manual_seed(0), shared=True)
    size = rollout.num_samples
    feedback = Feedback(torch.ones(size, device=device), torch.randn_like(rollout.sample), torch.ones(size, device=device))

    def backward(surrogate):
        surrogate.backward()
        return 1.0

    def run():
        for parameter in chain.parameters().values():
            parameter.grad = None
        Sweep(chain, chain.parameters(), backward, recompute=mode).run(rollout, draw, feedback)

    run()  # the first pass allocates gradients and workspaces
    peak = peak_bytes(run, device)
    started = time.perf_counter()
    run()
    return peak / 1e6, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="small", choices=("small", "sd15"))
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    chain = make_chain(options.size, device, options.batch)
    rollout = copy.copy(sample_chain(chain, options.batch, torch.Generator().manual_seed(1)))
    rows = []
    for part in tqdm([("K", length) for length in (*LENGTHS, STEPS)] + [("h", length) for length in LENGTHS]):
        name, length = part
        plan = EstimatorPlan(STEPS, fo_steps=length) if name == "K" else EstimatorPlan(STEPS, ho_length=length)
        rows.append((name, length, *(x for mode in ("recursive", "graph") for x in measure(chain, rollout, plan, mode, device))))
    print("| | recursive, MB | graph, MB | recursive, s | graph, s |\n|---|---|---|---|---|")
    for name, length, recursive, recursive_s, graph, graph_s in rows:
        print(f"| {name} = {length} | {recursive:.0f} | {graph:.0f} | {recursive_s:.2f} | {graph_s:.2f} |")
    for name in ("K", "h"):
        values = [row[2] for row in rows if row[0] == name]
        print(f"recursive, largest / smallest over {name}: {max(values) / min(values):.3f}")


if __name__ == "__main__":
    main()
