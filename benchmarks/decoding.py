"""How the peak memory of decoding a video and of its reward's gradient grows with the number of frames: whole, and in chunks.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py    # about four minutes of one core; --decoders Wan CogVideoX for some

The decoders are diffusers' classes with the structure of the released models and a fraction of their channels, with random weights; pictures
of 64 x 64 pixels. Measured is the peak of live tensors above what is there before, from latents to the gradient of the mean brightness with
respect to them. "in chunks" is `decode_in_chunks`: AnimateDiff's pictures one by one, Wan's latent frames one by one, CogVideoX's two by two.
Of what a causal decoder hands on from chunk to chunk a few states are kept, and the others made again. Slopes are least squares, of the
longer half of the videos. Seconds are the process's own, with PyTorch's first call of each kind among them.
"""

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLWan

from rlr_trainer.diagnosis.memory import measuring_memory
from rlr_trainer.pipelines.decoding import calls_checkpointed

PIXELS, DEVICE = 64, torch.device("cpu")
# Name -> (makes the decoder, numbers of latent frames, frames of so many latent ones)
FAMILIES: dict[str, tuple[Callable[[], Any], tuple[int, ...], Callable[[int], int]]] = {
    "AnimateDiff": (
        lambda: AutoencoderKL(
            block_out_channels=(16, 32, 64, 64), layers_per_block=2, norm_num_groups=8, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        (4, 8, 16, 32),
        lambda count: count,
    ),
    "Wan": (lambda: AutoencoderKLWan(base_dim=16), (2, 3, 5, 9, 13, 21), lambda count: 4 * count - 3),
    "CogVideoX": (
        lambda: AutoencoderKLCogVideoX(
            block_out_channels=(16, 32, 32, 64), norm_num_groups=8,
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        ),
        (3, 5, 9, 13),
        lambda count: 4 * count - 3,
    ),
}  # fmt: skip


def decode(vae: Any, latents: torch.Tensor, chunks: bool) -> torch.Tensor:
    """Pictures of latents [1, C, F, h, w], or of a picture decoder's [F, C, h, w]."""
    rows = latents.split(1) if chunks and latents.dim() == 4 else [latents]
    with calls_checkpointed(vae.decoder) if chunks else contextlib.nullcontext():
        return torch.cat([vae.decode(row, return_dict=False)[0] for row in rows])


def cost(vae: Any, count: int, chunks: bool) -> tuple[float, float]:
    """Megabytes at the peak of decoding and of a gradient through it, and seconds."""
    side = PIXELS // 8
    shape = (count, 4, side, side) if isinstance(vae, AutoencoderKL) else (1, 16, count, side, side)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    began = time.process_time()
    with measuring_memory(DEVICE) as meter:
        torch.autograd.grad(decode(vae, latents, chunks).mean(), latents)
    return meter.peak() / 1e6, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoders", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    chosen = parser.parse_args().decoders
    print("| decoder | frames | whole, MB | in chunks, MB | whole, s | in chunks, s |", "|---|---|---|---|---|---|", sep="\n")
    slopes = []
    for name in chosen:
        make, counts, frames_of = FAMILIES[name]
        torch.manual_seed(0)
        vae = make().eval().requires_grad_(False)
        frames, peaks = [frames_of(count) for count in counts], []
        for count, number in zip(counts, frames, strict=True):
            (whole, whole_s), (chunked, chunked_s) = (cost(vae, count, chunks) for chunks in (False, True))
            peaks.append((whole, chunked))
            print(f"| {name} | {number} | {whole:.1f} | {chunked:.1f} | {whole_s:.1f} | {chunked_s:.1f} |", flush=True)
        half = len(counts) // 2
        slopes.append((name, *(np.polyfit(frames[half:], column[half:], 1)[0] for column in zip(*peaks, strict=True))))
    print("\n| decoder | whole, MB per frame | in chunks, MB per frame | ratio |", "|---|---|---|---|", sep="\n")
    for name, whole, chunked in slopes:
        print(f"| {name} | {whole:.2f} | {chunked:.2f} | {chunked / whole:.3f} |")
    print(f"\nA frame's pixels in float32 are {3 * PIXELS**2 * 4 / 1e6:.3f} MB.")


if __name__ == "__main__":
    main()
