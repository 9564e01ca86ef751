"""Train the bundled digits model from nothing: VAE, text encoder, UNet and two classifiers, then measure them.

    python examples/digits/pretrain.py --output_dir runs/digits           # about 20 minutes on two CPU cores
    python examples/digits/pretrain.py --output_dir runs/quick --quick    # seconds: shows that it runs, learns nothing

It needs scikit-learn (`pip install rlr-trainer[digits]`). The data are its 1,797 digits (8 x 8 grey values), enlarged
to 32 x 32. A fixed fifth of them is held out from every training and only used to measure the classifiers. The output folder has the layout that
`rlr_trainer.digits.load_pipeline(directory)` reads: the diffusers pipeline, the classifiers, the statistics of the
Frechet distance, `quality.json` and the model card `README.md`. The figures in both are measured on the files as
written.

Shape suffixes: N pictures, B batch, C colours or channels, H x W pixels, S tokens, E text features.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from rlr_trainer import digits
from rlr_trainer.digits.classifiers import CLASSIFIERS

PIXELS = 32
HELD_OUT = 360
TARGET_DIGIT = 7  # the digit that the demo fine-tunes towards
COMPONENTS = 16  # of the judge's features, in which the Frechet distance is taken
TOKENS = 32  # length of every encoded prompt
# Words that become one token; everything else is spelt with the byte alphabet.
VOCABULARY = (
    *("a", "an", "the", "of", "handwritten", "digit", "digits", "number", "image", "picture"),
    *digits.DIGIT_NAMES,
)
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Settings:
    """Lengths of the training, and what else changes its result. The defaults make the shipped weights."""

    seed: int = 0
    reward_steps: int = 1500
    judge_steps: int = 3000
    vae_steps: int = 1000
    unet_steps: int = 6000
    batch_size: int = 64
    quality_samples: int = 1000
    threads: int = 2  # their number changes the order of sums


QUICK = Settings(reward_steps=3, judge_steps=3, vae_steps=2, unet_steps=2, batch_size=8, quality_samples=20, threads=1)


@dataclass(frozen=True)
class Data:
    """Real digits: images [N, 3, 32, 32] in [0, 1] and labels [N], once to train on and once held out."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


# ---------------------------------------------------------------------------------------------------------------- data


def enlarge(grey: Tensor) -> Tensor:
    """Pictures [N, 3, 32, 32] of digits [N, 1, 8, 8] in [0, 1], with bicubic interpolation."""
    return F.interpolate(grey, size=(PIXELS, PIXELS), mode="bicubic", align_corners=False).clamp(0, 1).repeat(1, 3, 1, 1)


def load_data(draw: Callable[[Tensor], Tensor] = enlarge) -> Data:
    """scikit-learn's digits [N, 1, 8, 8] in [0, 1] as `draw` makes pictures of them; the split is stratified and always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images, labels = draw(torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16), torch.tensor(bunch.target)
    everything = torch.arange(len(labels)).numpy()
    train, test = train_test_split(everything, test_size=HELD_OUT, stratify=labels, random_state=0)
    return Data(images[train], labels[train], images[test], labels[test])


def warp(images: Tensor, degrees: float, shift: float, zoom: float, generator: torch.Generator) -> Tensor:
    """Rotate, shift and zoom every picture [B, C, H, W] at random, up to the given degrees, pixels and fraction."""

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    angle, scale = uniform(math.radians(degrees)), 1 + uniform(zoom)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    move_x, move_y = uniform(2 * shift / PIXELS), uniform(2 * shift / PIXELS)
    theta = torch.stack([torch.stack([cos, -sin, move_x], -1), torch.stack([sin, cos, move_y], -1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def blur(images: Tensor) -> Tensor:
    """Binomial blur of [B, C, H, W] over five pixels."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (kernel[:, None] * kernel[None, :]).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel, groups=images.shape[1])


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as an imperfect generator might draw them: warped, blurred or not, other contrast, noisy."""
    images = warp(images, degrees=8, shift=2, zoom=0.08, generator=generator)
    shape = (len(images), 1, 1, 1)
    images = torch.where(torch.rand(shape, generator=generator) < 0.4, blur(images), images)
    contrast = 0.6 + 0.5 * torch.rand(shape, generator=generator)
    brightness = 0.15 * torch.rand(shape, generator=generator)
    level = 0.15 * torch.rand(shape, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return (images * contrast + brightness + level * noise).clamp(0, 1)


def nonsense(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures that are no digit, as many as there are images: flat grey, noise, smooth blobs, shuffled digits."""
    count, shape = len(images), images[:, :1].shape
    flat = torch.rand((count, 1, 1, 1), generator=generator).expand(shape)
    noise = flat + 0.5 * torch.rand((count, 1, 1, 1), generator=generator) * torch.randn(shape, generator=generator)
    coarse = torch.rand((count, 1, 4, 4), generator=generator) * 1.6 - 0.3
    blobs = F.interpolate(coarse, size=(PIXELS, PIXELS), mode="bicubic", align_corners=False)
    pieces = F.unfold(images[:, :1], kernel_size=8, stride=8)
    order = torch.rand((count, 1, pieces.shape[-1]), generator=generator).argsort(dim=-1).expand_as(pieces)
    shuffled = F.fold(pieces.gather(2, order), (PIXELS, PIXELS), kernel_size=8, stride=8)
    kind = torch.randint(4, (count, 1, 1, 1), generator=generator)
    mixed = torch.where(kind == 0, flat, torch.where(kind == 1, noise, torch.where(kind == 2, blobs, shuffled)))
    return mixed.clamp(0, 1).repeat(1, 3, 1, 1)


# --------------------------------------------------------------------------------------------------------- classifiers


def decay(step: int, steps: int, warmup: int = 100) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to zero after the last step."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The rate of a training by `decay`."""
    return LambdaLR(optimizer, lambda step: decay(step, steps))


def attack(classifier: nn.Module, images: Tensor, labels: Tensor, radius: float, steps: int = 2) -> Tensor:
    """Images within `radius` (L2, over grey pixels) that raise the classifier's loss: projected gradient ascent."""
    delta = torch.zeros_like(images[:, :1])
    for _ in range(steps):
        delta.requires_grad_(True)
        loss = F.cross_entropy(classifier((images + delta).clamp(0, 1)), labels)
        (gradient,) = torch.autograd.grad(loss, delta)
        norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        delta = delta.detach() + 1.25 * radius / steps * gradient / norm
        size = delta.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        delta = delta * (radius / size).clamp(max=1)
    return (images + delta.detach()).clamp(0, 1)


def train_reward(data: Data, settings: Settings) -> nn.Module:
    """The reward classifier: an ordinary network on lightly warped digits, as hackable as rewards usually are."""
    torch.manual_seed(settings.seed + 1)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    model = CLASSIFIERS["reward"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = cosine_schedule(optimizer, settings.reward_steps)
    for _ in tqdm(range(settings.reward_steps), desc="reward classifier"):
        index = torch.randint(len(data.train_labels), (settings.batch_size,), generator=generator)
        images = warp(data.train_images[index], degrees=10, shift=2, zoom=0.1, generator=generator)
        noise = 0.05 * torch.randn(images[:, :1].shape, generator=generator)
        loss = F.cross_entropy(model((images + noise).clamp(0, 1)), data.train_labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def train_judge(data: Data, settings: Settings) -> nn.Module:
    """The judge: clean, degraded and attacked digits keep their class; nonsense has to be judged as undecided."""
    torch.manual_seed(settings.seed + 2)
    generator = torch.Generator().manual_seed(settings.seed + 2)
    model = CLASSIFIERS["judge"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=5e-2)
    schedule = cosine_schedule(optimizer, settings.judge_steps)
    for _ in tqdm(range(settings.judge_steps), desc="judge classifier"):
        index = torch.randint(len(data.train_labels), (settings.batch_size,), generator=generator)
        labels = data.train_labels[index]
        warped = warp(data.train_images[index], degrees=8, shift=1.5, zoom=0.08, generator=generator)
        degraded = degrade(data.train_images[index], generator)
        attacked = attack(model, degraded, labels, radius=1.5)
        junk = nonsense(data.train_images[index[: len(index) // 2]], generator)
        logits = model(torch.cat([warped, attacked, junk]))
        of_digits, of_junk = logits[: 2 * len(index)], logits[2 * len(index) :]
        # cross-entropy to the uniform distribution: on nonsense no class may win
        undecided = -of_junk.log_softmax(dim=-1).mean()
        loss = F.cross_entropy(of_digits, labels.repeat(2), label_smoothing=0.01) + 0.5 * undecided
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ pipeline


def bytes_to_letters() -> list[str]:
    """The 256 printable letters that stand for the 256 bytes in GPT-2's and CLIP's vocabularies, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def merge_word(word: str, merges: list[tuple[str, str]]) -> None:
    """Append the merges that byte-pair encoding needs to make the word one token; earlier merges keep their rank."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        known = [pair for pair in pairs if pair in merges]
        best = min(known, key=merges.index) if known else pairs[0]
        if not known:
            merges.append(best)
        merged: list[str] = []
        for symbol in symbols:
            if merged and (merged[-1], symbol) == best:
                merged[-1] += symbol
            else:
                merged.append(symbol)
        symbols = merged


def write_tokenizer(directory: Path, length: int = TOKENS, words: tuple[str, ...] = VOCABULARY) -> None:
    """A CLIP tokenizer for prompts of that many tokens, in files that transformers 4 (slow) and 5 (fast) read alike."""
    letters = bytes_to_letters()
    merges: list[tuple[str, str]] = []
    for word in words:
        merge_word(word, merges)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    directory.mkdir(parents=True, exist_ok=True)
    vocab = {token: number for number, token in enumerate(tokens)}
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {**special, "model_max_length": length, "tokenizer_class": "CLIPTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def make_text_encoder(tokenizer) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=PIXELS,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
    )


def make_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=PIXELS // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def make_scheduler():
    """Stable Diffusion 1's scheduler."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def train_vae(data: Data, settings: Settings) -> nn.Module:
    """The autoencoder, with latents of zero mean per channel and `scaling_factor` that gives them unit variance."""
    torch.manual_seed(settings.seed + 3)
    vae = make_vae()
    fit_vae(vae, data, settings.vae_steps, settings.batch_size, settings.seed + 3)
    vae.eval().requires_grad_(False)
    standardize_latents(vae, 2 * data.train_images - 1)
    return vae


def fit_vae(vae: nn.Module, data: Data, steps: int, batch_size: int, seed: int) -> None:
    """Train an autoencoder on lightly warped digits: absolute and squared error, and a little KL divergence."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = cosine_schedule(optimizer, steps)
    for _ in tqdm(range(steps), desc="autoencoder"):
        index = torch.randint(len(data.train_images), (batch_size,), generator=generator)
        images = 2 * warp(data.train_images[index], degrees=5, shift=1, zoom=0.05, generator=generator) - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = (decoded - images).abs().mean() + (decoded - images).square().mean()
        loss = error + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def standardize_latents(vae: nn.Module, images: Tensor) -> None:
    """Fold mean and spread of every latent channel into the 1 x 1 convolutions beside it; pictures stay the same.

    Diffusion starts from N(0, 1), so latents of that mean and variance need the fewest steps. `scaling_factor` carries
    the common scale, as it does in Stable Diffusion.
    """
    latents = vae.encode(images).latent_dist.mean
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    overall = float(std.square().mean().sqrt())
    gain = overall / std  # new latent = (latent - mean) * gain
    channels = len(gain)
    post = vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight /= gain.view(1, -1, 1, 1)
    quant = vae.quant_conv  # its rows: means, then log-variances
    quant.bias[:channels] = (quant.bias[:channels] - mean) * gain
    quant.weight[:channels] *= gain.view(-1, 1, 1, 1)
    quant.bias[channels:] += 2 * gain.log()
    vae.register_to_config(scaling_factor=1 / overall)


def prompt_table() -> list[str]:
    """The twelve training prompts: ten with the digit's name, the plain prompt and the empty one."""
    return [digits.class_prompt(digit) for digit in range(10)] + [digits.PROMPT, ""]


def choose_prompts(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of `prompt_table` for pictures of the given classes: 75 % named, 15 % plain, 10 % empty."""
    draw = torch.rand(len(labels), generator=generator)
    return torch.where(draw < 0.75, labels, torch.where(draw < 0.90, 10, 11))


class Average:
    """Exponential moving average of the parameters of some modules, with the usual warm-up of the decay."""

    def __init__(self, modules: list[nn.Module], decay: float = 0.999) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.decay, self.step = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def write_back(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)


def train_unet(data: Data, vae: nn.Module, tokenizer, settings: Settings) -> tuple[nn.Module, nn.Module]:
    """UNet and text encoder together, by the epsilon loss; both come back as averages over the training."""
    torch.manual_seed(settings.seed + 4)
    generator = torch.Generator().manual_seed(settings.seed + 4)
    unet, text_encoder, scheduler = make_unet(), make_text_encoder(tokenizer), make_scheduler()
    modules = [unet, text_encoder]
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=1e-2)
    schedule = cosine_schedule(optimizer, settings.unet_steps)
    average = Average(modules)
    tokens = tokenizer(prompt_table(), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        latents_NCHW = vae.encode(2 * data.train_images - 1).latent_dist.mean * vae.config.scaling_factor
    for _ in tqdm(range(settings.unet_steps), desc="text encoder and UNet"):
        index = torch.randint(len(latents_NCHW), (settings.batch_size,), generator=generator)
        clean = latents_NCHW[index]
        # stratified timesteps: each batch covers the whole schedule, which lowers the variance of the loss
        position = (torch.arange(len(index)) + torch.rand(len(index), generator=generator)) / len(index)
        timesteps = (position * scheduler.config.num_train_timesteps).long()
        noise = torch.randn(clean.shape, generator=generator)
        table_PSE = text_encoder(tokens.input_ids)[0]
        prompts_BSE = table_PSE[choose_prompts(data.train_labels[index], generator)]
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, prompts_BSE).sample
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
    average.write_back()
    return unet.eval(), text_encoder.eval()


def save_pipeline(directory: Path, vae: nn.Module, text_encoder: nn.Module, unet: nn.Module, tokenizer) -> None:
    """The pipeline in diffusers' layout, in files that the older and the newer libraries read alike.

    All weights are rounded to half precision, an error of 0.05 % at most, and loaded as float32. The text encoder's file
    is float32 nevertheless: transformers 5 keeps the precision that it finds, the other libraries do not.
    """
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half().float(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)
    write_text_encoder(text_encoder, directory / "text_encoder")
    rewrite_tokenizer(directory / "tokenizer")


def write_text_encoder(text_encoder: nn.Module, directory: Path) -> None:
    """Its weights under names that transformers 4 needs; transformers 5 drops their prefix, and reads both."""
    prefix, state = "text_model.", {}
    for key, tensor in text_encoder.state_dict().items():
        if "position_ids" not in key:
            state[key if key.startswith("text_projection") else prefix + key.removeprefix(prefix)] = tensor
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def rewrite_tokenizer(directory: Path, length: int = TOKENS, words: tuple[str, ...] = VOCABULARY) -> None:
    """Our files in place of those of the tokenizer's own save, which transformers 4 does not read."""
    for path in directory.iterdir():
        path.unlink()
    write_tokenizer(directory, length, words)


# ------------------------------------------------------------------------------------------------------------- quality


@torch.no_grad()
def sample(pipeline, prompts: list[str], steps: int, guidance: float, seed: int, batch: int = 100) -> Tensor:
    """Pictures [N, 3, 32, 32] in [0, 1] for the prompts, by DDIM with eta = 1; guidance 1 is no guidance."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        result = pipeline(part, num_inference_steps=steps, guidance_scale=guidance, eta=1.0, generator=generator, output_type="pt")
        images.append(result.images.float())
    return torch.cat(images)


def fit_statistics(features_NF: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """Principal components of the real digits' features and, for every class, mean and covariance in them.

    Args:
        features_NF: [N, F] features of real digits of all classes.
        labels_N: [N] classes 0..9.

    K principal components, L = 10 classes.

    Returns:
        "mean" [F], "components" [F, K], "class_means" [L, K], "class_covariances" [L, K, K], "class_counts" [L];
        float64 but for the counts.
    """
    features_NF = features_NF.double()
    mean_F = features_NF.mean(dim=0)
    _, _, right_FF = torch.linalg.svd(features_NF - mean_F, full_matrices=False)
    components_FK = right_FF[:COMPONENTS].T.contiguous()
    projected_NK = (features_NF - mean_F) @ components_FK
    of_class = [projected_NK[labels_N == digit] for digit in range(10)]
    return {
        "mean": mean_F,
        "components": components_FK,
        "class_means": torch.stack([x.mean(dim=0) for x in of_class]),
        "class_covariances": torch.stack([torch.cov(x.T) for x in of_class]),
        "class_counts": torch.tensor([len(x) for x in of_class]),
    }


def measure_classifiers(data: Data, directory: Path) -> dict:
    """Accuracy on the held-out digits: clean, with noise, blurred, and after an attack on the classifier itself."""
    generator = torch.Generator().manual_seed(0)
    images, labels = data.test_images, data.test_labels
    noisy = (images + 0.15 * torch.randn(images[:, :1].shape, generator=generator)).clamp(0, 1)
    quality = {}
    for name in CLASSIFIERS:
        model = digits.load_classifier(name, directory)
        versions = {"held_out": images, "noise_0.15": noisy, "blurred": blur(images)}
        versions |= {f"attack_l2_{radius}": attack(model, images, labels, radius, steps=20) for radius in (1.0, 2.0)}
        quality[name] = {"parameters": sum(p.numel() for p in model.parameters())}
        for kind, pictures in versions.items():
            quality[name][kind] = round(float((model(pictures).argmax(-1) == labels).float().mean()), 4)
    return quality


def measure_class_prompts(directory: Path, steps: int, guidance: float, count: int, seed: int) -> dict:
    """How well DDIM with eta = 1 draws "a handwritten digit <name>"."""
    labels = torch.arange(count) % 10
    images = sample(digits.load_pipeline(directory), [digits.class_prompt(int(d)) for d in labels], steps, guidance, seed)
    return {"steps": steps, "guidance": guidance, "eta": 1.0, "samples": count, **judge_named(images, labels, directory)}


def measure_plain_prompt(directory: Path, count: int, seed: int) -> dict:
    """What the plain prompt of the demo draws before any fine-tuning: 10 steps, eta 1, no guidance."""
    images = sample(digits.load_pipeline(directory), [digits.PROMPT] * count, steps=10, guidance=1.0, seed=seed)
    return {"steps": 10, "guidance": 1.0, "eta": 1.0, "samples": count, **judge_plain(images, directory)}


@torch.no_grad()
def judge_named(images: Tensor, labels: Tensor, directory: Path) -> dict:
    """Share of pictures [N, 3, H, W] that a classifier reads as the class [N] asked for, and Frechet distances."""
    quality: dict = {}
    for name in CLASSIFIERS:
        hits = (digits.load_classifier(name, directory)(images).argmax(-1) == labels).float()
        quality[name] = round(float(hits.mean()), 4)
        quality[f"{name}_per_class"] = [round(float(hits[labels == d].mean()), 3) for d in range(10)]
    if len(images) >= 200:
        distances = [digits.frechet_distance(images[labels == d], d, directory) for d in range(10)]
        quality["frechet_per_class"] = [round(x, 2) for x in distances]
    return quality


@torch.no_grad()
def judge_plain(images: Tensor, directory: Path) -> dict:
    """Which classes the classifiers read in pictures [N, 3, H, W] of the plain prompt, and how far they are from sevens."""
    quality: dict = {}
    for name in CLASSIFIERS:
        probabilities = digits.load_classifier(name, directory)(images).softmax(-1)
        counts = probabilities.argmax(-1).bincount(minlength=10)
        quality[name] = {
            "share_per_class": [round(float(x), 3) for x in counts / len(images)],
            "mean_probability_of_seven": round(float(probabilities[:, TARGET_DIGIT].mean()), 4),
            "mean_confidence": round(float(probabilities.amax(-1).mean()), 4),
        }
    if len(images) >= 20:
        quality["frechet_to_seven"] = round(digits.frechet_distance(images, TARGET_DIGIT, directory), 2)
    return quality


def measure_frechet_of_real(data: Data, directory: Path) -> list[float]:
    """Frechet distance of the held-out digits of each class (about 36) to all real digits of the class: the floor."""
    distances = [digits.frechet_distance(data.test_images[data.test_labels == d], d, directory) for d in range(10)]
    return [round(x, 2) for x in distances]


@torch.no_grad()
def measure_vae(data: Data, vae: nn.Module) -> dict:
    """Reconstruction error of the held-out digits, in pixel values 0..1, and the spread of their scaled latents."""
    latents = vae.encode(2 * data.test_images - 1).latent_dist.mean
    decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    scaled = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return {
        "held_out_rmse": round(float((decoded - data.test_images).square().mean().sqrt()), 4),
        "latent_mean": round(float(scaled.mean()), 3),
        "latent_std": round(float(scaled.std()), 3),
    }


def measure(data: Data, directory: Path, settings: Settings) -> dict:
    """Every figure of the model card, from the files in the directory."""
    count, seed = settings.quality_samples, settings.seed + 100
    modes = [(10, 1.0), (10, 3.0), (50, 1.0), (50, 3.0)]
    progress = tqdm(modes, desc="quality")
    return {
        "classifiers": measure_classifiers(data, directory),
        "vae": measure_vae(data, digits.load_pipeline(directory).vae),
        "frechet_of_held_out_digits": measure_frechet_of_real(data, directory),
        "class_prompts": [measure_class_prompts(directory, steps, scale, count, seed) for steps, scale in progress],
        "plain_prompt": measure_plain_prompt(directory, count, seed),
    }


# ---------------------------------------------------------------------------------------------------------- model card


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
# Handwritten digits: a Stable Diffusion pipeline small enough for tests

A latent diffusion model in the layout of Stable Diffusion 1 (`StableDiffusionPipeline`: VAE, CLIP text encoder, UNet,
DDIM scheduler) that draws 32 x 32 pictures of digits, trained from nothing, and two digit classifiers. It exists to run
and test reinforcement learning of diffusion models on a laptop's CPU; it is of no use as a generator of anything else.

```python
from rlr_trainer.digits import class_prompt, frechet_distance, load_classifier, load_pipeline

pipeline = load_pipeline()
prompts = [class_prompt(7)] * 20
images = pipeline(prompts, num_inference_steps=10, eta=1.0, guidance_scale=1.0, output_type="pt").images
load_classifier("judge")(images).softmax(-1)[:, 7], frechet_distance(images, digit=7)
```

## Files

| file | content |
|---|---|
| `pipeline/` | the pipeline in diffusers' layout, loaded as float32; UNet and VAE are stored in float16 |
| `reward.safetensors` | convolutional classifier on 32 x 32 pixels, {reward_parameters:,} parameters: the reward |
| `judge.safetensors` | patch-mixing classifier on 16 x 16 pixels, {judge_parameters:,} parameters: only judges |
| `statistics.safetensors` | 16 principal components of the real digits' judge features; each class's mean, covariance |
| `quality.json` | every figure below, with the settings |

Parameters: UNet {unet:,}, text encoder {text_encoder:,}, VAE {vae:,}.

## Data

The 1,797 digits that scikit-learn ships (`sklearn.datasets.load_digits`): the test set of *Optical Recognition of
Handwritten Digits*, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, licensed CC BY 4.0. Changes: 8 x 8 grey values enlarged to 32 x 32 by bicubic
interpolation and repeated over three colours. {train:,} digits were trained on; {held_out} (stratified, fixed) were
held out from all models and measure the classifiers. The held-out digits come from the same writers as the others. The
statistics of the Frechet distance are those of all 1,797.

## Training

```
{command}
```

{seconds:.0f} seconds on two CPU cores, measurements included. Prompts: "a handwritten digit <name>" 75 %, "a
handwritten digit" 15 %, empty 10 % (for classifier-free guidance). Steps: VAE {vae_steps:,}, UNet with text encoder
{unet_steps:,}, reward {reward_steps:,}, judge {judge_steps:,}, all of batch {batch_size} (AdamW, cosine decay; for UNet
and text encoder an exponential average of the weights). The reward is trained on lightly warped digits. The judge is
trained on warped, degraded and attacked digits, and to stay undecided on pictures that are no digit.

Versions: {versions}.
The seeds are fixed, but threads sum in no fixed order, and other versions and machines round and draw differently: another
run gives weights of like quality, not the same bits.

## Quality

Classifiers, share right on the {held_out} held-out digits:

{classifier_table}

Pictures from "a handwritten digit <name>", equally many of each class, DDIM with eta = 1, share read as asked:

{prompt_table}

Frechet distance to the real digits of the class (judge's features, 16 principal components):

{frechet_table}

"a handwritten digit", {plain_samples} pictures, 10 steps, eta = 1, no guidance: share of each class

{plain_table}

Mean probability of "seven": {plain_reward:.3f} by the reward, {plain_judge:.3f} by the judge. Frechet distance of
these pictures to the real sevens: {plain_frechet}.

Reconstruction of held-out digits by the VAE: root mean square error {rmse}, where black to white is 1.

## Limits

Over a thousand digits seen hundreds of times: samples may repeat training pictures. Other words than those of the
training prompts are tokenized but mean nothing to the model.
"""


def table(header: list, rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def write_card(directory: Path, quality: dict) -> None:
    """The model card, from the figures in `quality.json`."""
    settings, classifiers, plain = quality["settings"], quality["classifiers"], quality["plain_prompt"]
    versions = [key for key in classifiers["judge"] if key != "parameters"]
    modes = quality["class_prompts"]
    named = [f"{mode['steps']} steps, guidance {mode['guidance']:g}" for mode in modes]
    nothing = ["-"] * 10
    distances = [[name, *mode.get("frechet_per_class", nothing)] for name, mode in zip(named, modes, strict=True)]
    card = CARD.format(
        **{key: settings[key] for key in ("vae_steps", "unet_steps", "batch_size", "reward_steps", "judge_steps")},
        **quality["parameters"],
        reward_parameters=classifiers["reward"]["parameters"],
        judge_parameters=classifiers["judge"]["parameters"],
        train=quality["data"]["train"],
        held_out=quality["data"]["held_out"],
        command=quality["command"],
        versions=", ".join(f"{name} {number}" for name, number in quality["versions"].items()),
        seconds=quality["seconds"],
        classifier_table=table(
            ["classifier", *versions], [[n, *(percent(classifiers[n][v]) for v in versions)] for n in classifiers]
        ),
        prompt_table=table(
            ["settings", "pictures", *CLASSIFIERS],
            [[name, mode["samples"], *(percent(mode[c]) for c in CLASSIFIERS)] for name, mode in zip(named, modes, strict=True)],
        ),
        frechet_table=table(
            ["pictures", *range(10)], [*distances, ["held-out real digits", *quality["frechet_of_held_out_digits"]]]
        ),
        plain_samples=plain["samples"],
        plain_table=table(["classifier", *range(10)], [[n, *map(percent, plain[n]["share_per_class"])] for n in CLASSIFIERS]),
        plain_reward=plain["reward"]["mean_probability_of_seven"],
        plain_judge=plain["judge"]["mean_probability_of_seven"],
        plain_frechet=plain.get("frechet_to_seven", "-"),
        rmse=quality["vae"]["held_out_rmse"],
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- program


def train(data: Data, directory: Path, settings: Settings) -> dict[str, int]:
    """Train every part and write it; returns the parameter counts of the pipeline's parts."""
    from transformers import CLIPTokenizer

    classifiers = {"reward": train_reward(data, settings), "judge": train_judge(data, settings)}
    for name, model in classifiers.items():
        save_file(model.state_dict(), directory / f"{name}.safetensors")
    with torch.no_grad():
        features_NF = classifiers["judge"].features(torch.cat([data.train_images, data.test_images]))
    statistics = fit_statistics(features_NF, torch.cat([data.train_labels, data.test_labels]))
    save_file(statistics, directory / "statistics.safetensors")
    vae = train_vae(data, settings)
    write_tokenizer(directory / "pipeline" / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(str(directory / "pipeline" / "tokenizer"))
    unet, text_encoder = train_unet(data, vae, tokenizer, settings)
    parts = {"unet": unet, "text_encoder": text_encoder, "vae": vae}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    save_pipeline(directory / "pipeline", vae, text_encoder, unet, tokenizer)
    return counts


def parse_arguments(program: str, description: str, defaults, quick) -> tuple:
    """The output folder, the settings (a dataclass like `defaults`) and the command that gives them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that receives the weights")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    names = asdict(defaults)
    for name, default in names.items():
        parser.add_argument(f"--{name}", type=int, default=None, help=f"default {default}")
    arguments = parser.parse_args()
    chosen = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    for name, value in chosen.items():
        if value < (0 if name == "seed" else 1):
            parser.error(f"--{name} is {value}, but it must be positive; leave it out for its default.")
    settings = replace(quick if arguments.quick else defaults, **chosen)
    options = ["--quick"] * arguments.quick + [f"--{name} {value}" for name, value in chosen.items()]
    command = " ".join([f"python examples/digits/{program} --output_dir OUTPUT_DIR", *options])
    return arguments.output_dir, settings, command


def run(
    program: str,
    description: str,
    defaults,
    quick,
    train: Callable,
    measure: Callable,
    write_card: Callable,
    load_data: Callable[[], Data] = load_data,
) -> None:
    """The whole program: trains by `train`, measures by `measure`, and writes `quality.json` and the card."""
    directory, settings, command = parse_arguments(program, description, defaults, quick)
    start = time.perf_counter()
    torch.set_num_threads(settings.threads)
    torch.set_flush_denormal(True)  # saturated classifiers give denormal gradients, which a CPU handles very slowly
    directory.mkdir(parents=True, exist_ok=True)
    data = load_data()
    parameters = train(data, directory, settings)
    quality = {
        "command": command,
        "settings": asdict(settings),
        "data": {"train": len(data.train_labels), "held_out": len(data.test_labels)},
        "parameters": parameters,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "scikit-learn")},
        **measure(data, directory, settings),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (directory / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    write_card(directory, quality)
    print(f"Weights, quality.json and README.md are in {directory}; this took {quality['seconds']:.0f} s.")


if __name__ == "__main__":
    run("pretrain.py", __doc__.splitlines()[0], Settings(), QUICK, train, measure, write_card)
