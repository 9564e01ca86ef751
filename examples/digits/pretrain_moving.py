"""Train the bundled video model of moving digits from nothing: two classifiers, a VAE, a text encoder and a Wan, then measure them.

    python examples/digits/pretrain_moving.py --output_dir runs/moving               # about an hour on two CPU cores
    python examples/digits/pretrain_moving.py --output_dir runs/moving --minutes 20  # a part of it; the same command goes on
    python examples/digits/pretrain_moving.py --output_dir runs/quick --quick        # seconds: shows that it runs, learns nothing

Needs and data are those of `pretrain.py`, from which this program imports what they share. The state of each training lies in
`OUTPUT_DIR/state`, which the package does not need. A call takes up what it finds there, so the program may be stopped at any
time. `log.jsonl` has the losses.

Flow matching: x_sigma = (1 - sigma) x0 + sigma x1 with x0 a latent, x1 noise, and the network learns v = x1 - x0.

Shape suffixes: N clips, B batch, F frames or latent frames, C colours or channels, H x W pixels, S prompt tokens, E text features.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pretrain
import torch
import torch.nn.functional as F
from pretrain import (
    VOCABULARY,
    Average,
    Data,
    attack,
    decay,
    degrade,
    nonsense,
    percent,
    rewrite_tokenizer,
    run,
    table,
    write_tokenizer,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from rlr_trainer import digits
from rlr_trainer.digits import moving
from rlr_trainer.digits.moving_classifiers import DIRECTIONS, MOVING_CLASSIFIERS, MovingClassifier
from rlr_trainer.rewards.motion import mean_frame_difference

PIXELS, FRAMES = moving.PIXELS, moving.NUM_FRAMES
DIGIT_PIXELS = 20  # side of the digit's box, which its outer columns seldom fill
OVERHANG = 1.5  # pixels by which the box may leave the picture
SPEEDS = (1.0, 1.6)  # pixels per frame
ACROSS = 5.0  # pixels from the middle, at most, across the motion
STEPS_XY = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])  # of DIRECTIONS; y grows downwards
WORDS = (*VOCABULARY, "moving", *DIRECTIONS)
TOKENS = 16  # rows of an encoded prompt; the longest training prompt has 8 tokens
PIPELINE_ROWS = 512  # to which WanPipeline fills them by default
TEXT_WIDTH = 32
HEADS, HEAD_WIDTH, LAYERS = 4, 32, 5
SHIFT = 3.0  # Wan's for small videos


@dataclass(frozen=True)
class Settings:
    """Lengths of the training, and what else changes its result. The defaults make the shipped weights."""

    seed: int = 0
    vae_steps: int = 800
    reward_steps: int = 1000
    judge_steps: int = 1200
    flow_steps: int = 5000
    batch_size: int = 32
    pool: int = 20_000  # clips whose latents the Wan learns from
    quality_samples: int = 400
    minutes: int = 600  # after which the training stops, to be gone on with
    threads: int = 2  # their number changes the order of sums


QUICK = Settings(
    vae_steps=2, reward_steps=2, judge_steps=2, flow_steps=2, batch_size=4, pool=16, quality_samples=40, threads=1
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Clips:
    """Clips [B, F, 3, 32, 32] in [0, 1], their digits [B] and directions [B]."""

    videos: Tensor
    labels: Tensor
    directions: Tensor


def small_digits(images: Tensor) -> Tensor:
    """Digits [N, 1, 8, 8] in [0, 1], enlarged to their box in the middle of a black canvas, [N, 1, 32, 32]."""
    box = F.interpolate(images, size=(DIGIT_PIXELS, DIGIT_PIXELS), mode="bicubic", align_corners=False).clamp(0, 1)
    return F.pad(box, [(PIXELS - DIGIT_PIXELS) // 2] * 4)


def load_data() -> Data:
    """The digits of `pretrain.load_data` and its split, as `small_digits`."""
    return pretrain.load_data(small_digits)


def draw_paths(directions: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts [B, F, 2] (x, y) in pixels from the middle: a straight path of constant speed that keeps the box in the picture.

    The box leaves the picture by `OVERHANG` pixels at most along the path; the speed and the place are uniform.
    """
    count = len(directions)
    speed, along, across = torch.rand((3, count), generator=generator).unbind(0)
    speed = SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * speed
    length, room = speed * (FRAMES - 1), (PIXELS - DIGIT_PIXELS) / 2 + OVERHANG
    start = -room + (2 * room - length) * along
    progress_BF = start[:, None] + speed[:, None] * torch.arange(FRAMES)
    step_B2 = STEPS_XY[directions]
    side_B2 = step_B2.flip(-1).abs() * (ACROSS * (2 * across - 1))[:, None]
    return progress_BF[..., None] * step_B2[:, None] + side_B2[:, None]


def render(canvases: Tensor, shifts: Tensor) -> Tensor:
    """Clips [B, F, 3, 32, 32]: each canvas [B, 1, 32, 32] shifted by [B, F, 2] pixels (bilinear, black outside)."""
    theta = torch.eye(2, 3).repeat(*shifts.shape[:2], 1, 1)
    theta[..., 2] = -2 * shifts / PIXELS  # frame(x) = canvas(x - shift), in units of half a canvas
    still = canvases[:, None].expand(-1, shifts.shape[1], -1, -1, -1).flatten(0, 1)
    grid = F.affine_grid(theta.flatten(0, 1), list(still.shape), align_corners=False)
    frames = F.grid_sample(still, grid, padding_mode="zeros", align_corners=False)
    return frames.unflatten(0, shifts.shape[:2]).repeat(1, 1, 3, 1, 1)


def draw_clips(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> Clips:
    """So many clips of digits drawn with replacement, equally many of each direction."""
    index = torch.randint(len(labels), (count,), generator=generator)
    directions = torch.arange(count) % len(DIRECTIONS)
    return Clips(render(images[index], draw_paths(directions, generator)), labels[index], directions)


def prompt_table() -> list[str]:
    """Every training prompt: each digit or none, with each direction, without one, or without "moving"; the last is empty."""
    names = [None, *range(10)]
    return [prompt for digit in names for prompt in _prompts_of(digit)] + [""]


def _prompts_of(digit: int | None) -> list[str]:
    still = digits.PROMPT if digit is None else digits.class_prompt(digit)
    return [*(moving.moving_prompt(digit, direction) for direction in DIRECTIONS), moving.moving_prompt(digit), still]


def choose_prompts(labels: Tensor, directions: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of `prompt_table` for clips: 10 % empty; of the others 20 % without digit, and 20 % without direction (half without "moving")."""
    no_digit, no_direction, still, empty = (torch.rand((4, len(labels)), generator=generator) < _shares()).unbind(0)
    digit_row = torch.where(no_digit, 0, 1 + labels)
    column = torch.where(no_direction, len(DIRECTIONS) + still.long(), directions)
    return torch.where(empty, 66, 6 * digit_row + column)


def _shares() -> Tensor:
    return torch.tensor([[0.2], [0.2], [0.5], [0.1]])


# --------------------------------------------------------------------------------------------------------- classifiers


def train_reward(data: Data, settings: Settings) -> "Training":
    """The reward classifier: an ordinary network on lightly noisy clips, as hackable as rewards usually are."""
    torch.manual_seed(settings.seed + 1)
    model = MOVING_CLASSIFIERS["reward"]()

    def loss(generator: torch.Generator) -> Tensor:
        clips = draw_clips(data.train_images, data.train_labels, settings.batch_size, generator)
        noisy = (clips.videos + 0.05 * torch.randn(clips.videos[:, :, :1].shape, generator=generator)).clamp(0, 1)
        of_digits, of_directions = model(noisy)
        of_frames = F.cross_entropy(of_digits.flatten(0, 1), clips.labels.repeat_interleave(FRAMES))
        return of_frames + F.cross_entropy(of_directions, clips.directions)

    return Training("reward", model, loss, settings.reward_steps, settings.seed + 1)


def train_judge(data: Data, settings: Settings) -> "Training":
    """The judge: clean, degraded and attacked frames keep their class; nonsense and standing clips have to be undecided."""
    torch.manual_seed(settings.seed + 2)
    model = MOVING_CLASSIFIERS["judge"]()

    def loss(generator: torch.Generator) -> Tensor:
        clips = draw_clips(data.train_images, data.train_labels, settings.batch_size, generator)
        return judge_frames(model, clips, generator) + judge_motion(model, clips, generator)

    return Training("judge", model, loss, settings.judge_steps, settings.seed + 2, weight_decay=5e-2)


def judge_frames(model: MovingClassifier, clips: Clips, generator: torch.Generator) -> Tensor:
    """Loss of the digits in three frames of each clip: clean, attacked, and shuffled to nonsense."""
    chosen = torch.randint(FRAMES, (len(clips.labels), 3), generator=generator)
    frames = clips.videos[torch.arange(len(chosen))[:, None], chosen].flatten(0, 1)
    labels = clips.labels.repeat_interleave(3)
    attacked = attack(model.read_frames, degrade(frames, generator), labels, radius=1.0, steps=1)
    junk = nonsense(frames[::4], generator)
    logits = model.read_frames(torch.cat([frames, attacked, junk]))
    of_digits, of_junk = logits[: 2 * len(labels)], logits[2 * len(labels) :]
    undecided = -of_junk.log_softmax(dim=-1).mean()  # cross-entropy to the uniform distribution
    return F.cross_entropy(of_digits, labels.repeat(2), label_smoothing=0.01) + 0.5 * undecided


def judge_motion(model: MovingClassifier, clips: Clips, generator: torch.Generator) -> Tensor:
    """Loss of the directions of noisy clips, and of clips that stand still, for which no direction may win."""
    noise = 0.1 * torch.randn(clips.videos[:, :, :1].shape, generator=generator)
    standing = clips.videos[:, :1].expand(-1, FRAMES, -1, -1, -1)
    of_moving, of_standing = (model.read_directions((videos + noise).clamp(0, 1)) for videos in (clips.videos, standing))
    undecided = -of_standing.log_softmax(dim=-1).mean()
    return F.cross_entropy(of_moving, clips.directions, label_smoothing=0.01) + 0.5 * undecided


# ------------------------------------------------------------------------------------------------------------ pipeline


def make_vae() -> nn.Module:
    """Wan's VAE on patches of 2 x 2 pixels: a latent frame of 8 x 8 of the first frame and of every two after it."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


def make_text_encoder(tokenizer) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return UMT5EncoderModel(config)


def make_transformer() -> nn.Module:
    """Wan's transformer on 4 x 4 patches of each of 5 latent frames; its output is zero at first."""
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=3 * HEADS * HEAD_WIDTH,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def make_scheduler():
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)


# ------------------------------------------------------------------------------------------------------------ training


class Log:
    """Losses, as means over stretches of steps, with the CPU seconds of their training: to the screen and to `log.jsonl`."""

    def __init__(self, path: Path, every: int = 50) -> None:
        self.path, self.every = path, every
        self._losses: list[float] = []

    def add(self, training: "Training", loss: float) -> None:
        self._losses.append(loss)
        if training.step % self.every == 0 or training.step == training.steps:
            mean = sum(self._losses) / len(self._losses)
            line = {"part": training.name, "step": training.step, "loss": round(mean, 5), "cpu_seconds": round(training.seconds, 1)}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            self._losses.clear()


class Training:
    """A module under training (AdamW, cosine decay, an average of the weights); `state` and `restore` are all that a stopped one needs.

    Args:
        name: of its checkpoint.
        module: what is trained.
        loss: makes the loss of a step, with the generator as its only source of chance.
        steps: of the whole training. Where a stopped one goes on with another number, the decay follows that.
        seed: of the generator.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        loss: Callable[[torch.Generator], Tensor],
        steps: int,
        seed: int,
        rate: float = 2e-3,
        weight_decay: float = 1e-2,
    ) -> None:
        self.name, self.module, self.loss, self.steps, self.rate = name, module, loss, steps, rate
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(module.parameters(), weight_decay=weight_decay)
        self.average = Average([module])
        self.step, self.seconds = 0, 0.0  # of CPU

    def advance(self) -> float:
        """One step; returns its loss."""
        started = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * decay(self.step, self.steps)
        loss = self.loss(self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        self.step += 1
        self.seconds += time.process_time() - started
        return loss.item()

    def state(self) -> dict:
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.average,
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def restore(self, state: dict) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.average = state["average"]
        self.generator.set_state(state["generator"])
        self.step = self.average.step = state["step"]
        self.seconds = state["seconds"]

    def finish(self) -> None:
        """The module gets the averages over the training, which ends with it."""
        self.average.write_back()
        self.module.eval().requires_grad_(False)


class Runner:
    """Runs trainings to their ends, from their last checkpoints in the folder; leaves the program when its time is up."""

    def __init__(self, folder: Path, log: Log, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log, self.end = folder, log, time.monotonic() + 60 * minutes
        self.seconds: dict[str, float] = {}

    def run(self, training: Training) -> None:
        path = self.folder / f"{training.name}.pt"
        if path.is_file():
            training.restore(torch.load(path, weights_only=True))
        while training.step < training.steps:
            self.log.add(training, training.advance())
            ended, whole = time.monotonic() > self.end, training.step >= training.steps
            if ended or whole or training.step % 50 == 0:
                write_whole(path, training.state())
            if ended and not whole:
                raise SystemExit(
                    f"{training.name}: stopped after step {training.step} of {training.steps}; the same command goes on"
                )
        training.finish()
        self.seconds[training.name] = round(training.seconds, 1)


def write_whole(path: Path, state: dict) -> None:
    """Write a file that is there as a whole or not at all, however the program ends."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def train_vae(data: Data, settings: Settings) -> Training:
    """The autoencoder: absolute and squared error, and a little KL divergence."""
    torch.manual_seed(settings.seed + 3)
    vae, count = make_vae(), max(settings.batch_size // 4, 1)

    def loss(generator: torch.Generator) -> Tensor:
        videos = as_input(draw_clips(data.train_images, data.train_labels, count, generator).videos)
        posterior = vae.encode(videos).latent_dist
        error = decode_unclamped(vae, posterior.sample(generator)) - videos
        return error.abs().mean() + error.square().mean() + 1e-3 * kl_divergence(posterior)

    return Training("vae", vae, loss, settings.vae_steps, settings.seed + 3, weight_decay=1e-4)


def decode_unclamped(vae: nn.Module, latents: Tensor) -> Tensor:
    """As the VAE's `decode`, [B, 3, F, H, W], without its clamp to [-1, 1]: beyond black it has no gradient, and training ends in all black."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    chunks: list[Tensor] = []
    hook = vae.decoder.register_forward_hook(lambda module, inputs, output: chunks.append(output))
    vae.decode(latents)
    hook.remove()
    return unpatchify(torch.cat(chunks, dim=2), vae.config.patch_size)


def as_input(videos: Tensor) -> Tensor:
    """Videos [B, F, 3, H, W] in [0, 1] as the VAE takes them, [B, 3, F, H, W] in [-1, 1]."""
    return 2 * videos.transpose(1, 2) - 1


def kl_divergence(posterior) -> Tensor:
    """Mean over the latents of the divergence from N(0, 1); diffusers' own sums over three of five dimensions."""
    return 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()


@torch.no_grad()
def encode(vae: nn.Module, videos: Tensor, batch: int = 50) -> Tensor:
    """Means of the latents [N, 4, 5, 8, 8], as they are."""
    return torch.cat([vae.encode(as_input(part)).latent_dist.mean for part in videos.split(batch)])


def make_pool(data: Data, vae: nn.Module, settings: Settings) -> dict[str, Tensor]:
    """Latents of clips for the Wan's training.

    Returns:
        "latents" [N, 4, 5, 8, 8], standardized with the "mean" [4] and "std" [4] of the channels; "labels" [N], "directions" [N].
    """
    generator, parts = torch.Generator().manual_seed(settings.seed + 4), []
    for start in range(0, settings.pool, 400):
        clips = draw_clips(data.train_images, data.train_labels, min(400, settings.pool - start), generator)
        parts.append((encode(vae, clips.videos), clips.labels, clips.directions))
    latents, labels, directions = (torch.cat(part) for part in zip(*parts, strict=True))
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    latents = (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    return {"latents": latents, "mean": mean, "std": std, "labels": labels, "directions": directions}


def load_pool(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The pool in the file; made, and written to it, if there is none."""
    if not path.is_file():
        write_whole(path, make())
    return torch.load(path, weights_only=True)


class WeightedRows:
    """Wan's attention processor with a mask on the prompt's rows, which diffusers' block does not pass on.

    `mask` [B, 1, 1, S] is added to the attention logits of the rows.
    """

    def __init__(self) -> None:
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        self.own, self.mask = WanAttnProcessor(), None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        return self.own(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def row_weights(lengths: Tensor, rows: Tensor, tokens: int = TOKENS) -> Tensor:
    """Mask [B, 1, 1, tokens] with which the empty rows after a prompt of lengths [B] < tokens count as if there were `rows` [B] in all.

    Empty rows have no position, so they stay equal to each other. Those that are there therefore do what n times as many do, if
    log(n) is added to their attention logits.
    """
    ratio = (rows - lengths) / (tokens - lengths)
    empty = torch.arange(tokens) >= lengths[:, None]
    return torch.where(empty, ratio.log()[:, None], 0.0).view(-1, 1, 1, tokens)


def choose_rows(count: int, generator: torch.Generator) -> Tensor:
    """Numbers of rows [count] of encoded prompts, as floats: 16 for half of them, the pipeline's 512 for a quarter, else between."""
    draw, between = torch.rand((2, count), generator=generator).unbind(0)
    between = (TOKENS * (PIPELINE_ROWS / TOKENS) ** between).round()
    return torch.where(draw < 0.5, float(TOKENS), torch.where(draw < 0.75, float(PIPELINE_ROWS), between))


def encode_table(encoder: nn.Module, tokens) -> Tensor:
    """What `WanPipeline` makes of tokenized prompts, [P, S, E]: states, and zeros after the end."""
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask.unsqueeze(-1)


def tokenize(tokenizer, prompts: list[str]):
    return tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")


def train_flow(tokenizer, pool: dict[str, Tensor], settings: Settings) -> tuple[Training, nn.Module, nn.Module]:
    """Transformer and text encoder together, by the flow-matching loss; both come back beside their training."""
    torch.manual_seed(settings.seed + 5)
    transformer, encoder, weighted = make_transformer(), make_text_encoder(tokenizer), WeightedRows()
    tokens = tokenize(tokenizer, prompt_table())
    for block in transformer.blocks:
        block.attn2.set_processor(weighted)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pool["labels"]), (settings.batch_size,), generator=generator)
        clean = pool["latents"][index]
        # stratified times: each batch covers the whole path, which lowers the variance of the loss
        uniform = (torch.arange(len(index)) + torch.rand(len(index), generator=generator)) / len(index)
        sigmas = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = clean.lerp(noise, sigmas.view(-1, 1, 1, 1, 1))
        prompts = choose_prompts(pool["labels"][index], pool["directions"][index], generator)
        weighted.mask = row_weights(tokens.attention_mask.sum(1)[prompts], choose_rows(len(index), generator))
        text = encode_table(encoder, tokens)[prompts]
        return F.mse_loss(transformer(noisy, 1000 * sigmas, text, return_dict=False)[0], noise - clean)

    both = nn.ModuleList([transformer, encoder])
    return Training("flow", both, loss, settings.flow_steps, settings.seed + 5, rate=1.5e-3), transformer, encoder


def save_pipeline(directory: Path, vae: nn.Module, text_encoder: nn.Module, transformer: nn.Module, tokenizer) -> None:
    """The pipeline in diffusers' layout; precisions and files as in `pretrain.save_pipeline`."""
    from diffusers import WanPipeline

    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.half().float(),
        vae=vae.half(),
        scheduler=make_scheduler(),
        transformer=transformer.half(),
    )
    pipeline.save_pretrained(directory)
    rewrite_tokenizer(directory / "tokenizer", TOKENS, WORDS)


# ------------------------------------------------------------------------------------------------------------- quality


@dataclass(frozen=True)
class Mode:
    """How clips are drawn."""

    steps: int = 10
    guidance: float = 1.0


MODES = (Mode(), Mode(guidance=3.0), Mode(steps=20), Mode(steps=20, guidance=3.0))


@torch.no_grad()
def sample(pipeline, prompts: list[str], mode: Mode, seed: int, batch: int = 40) -> Tensor:
    """Clips [N, F, 3, 32, 32] in [0, 1] for the prompts, by the pipeline's own call."""
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": mode.steps, "guidance_scale": mode.guidance, **moving.SIZE}
    videos = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        videos.append(pipeline(part, generator=generator, output_type="pt", **options).frames.float())
    return torch.cat(videos)


def held_out_clips(data: Data, seed: int) -> Clips:
    """A clip of every held-out digit in every direction."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(len(data.test_labels)).repeat_interleave(len(DIRECTIONS))
    directions = torch.arange(len(DIRECTIONS)).repeat(len(data.test_labels))
    return Clips(render(data.test_images[index], draw_paths(directions, generator)), data.test_labels[index], directions)


@torch.no_grad()
def judge_clips(clips: Clips, directory: Path) -> dict:
    """Shares of clips that each classifier reads as their digit (by the mean over the frames), direction, and both; and measures of motion."""
    quality: dict = {"clips": len(clips.labels)}
    for name in MOVING_CLASSIFIERS:
        classifier = moving.load_moving_classifier(name, directory)
        of_digits, of_directions = moving.read_clips(classifier, clips.videos)
        right = {"digit": of_digits.argmax(-1) == clips.labels, "direction": of_directions.argmax(-1) == clips.directions}
        right["both"] = right["digit"] & right["direction"]
        quality[name] = {key: round(float(hits.float().mean()), 4) for key, hits in right.items()}
        quality[name]["digit_per_class"] = [round(float(right["digit"][clips.labels == d].float().mean()), 3) for d in range(10)]
        quality[name]["frames_of_one_digit"] = round(float(moving.one_digit_share(classifier, clips.videos).mean()), 4)
    quality["motion"] = round(float(mean_frame_difference(clips.videos).mean()), 4)
    return quality


def every_prompt(count: int) -> tuple[list[str], Tensor, Tensor]:
    """So many prompts that name digit and direction, equally many of each pair, with both."""
    labels, directions = torch.arange(count) % 10, torch.arange(count) // 10 % len(DIRECTIONS)
    pairs = zip(labels.tolist(), directions.tolist(), strict=True)
    return [moving.moving_prompt(digit, DIRECTIONS[direction]) for digit, direction in pairs], labels, directions


@torch.no_grad()
def measure_plain_prompt(pipeline, directory: Path, count: int, seed: int) -> dict:
    """What the plain prompt of the demo draws before any fine-tuning, as the judge reads it."""
    videos = sample(pipeline, [moving.moving_prompt()] * count, Mode(), seed)
    judge = moving.load_moving_classifier("judge", directory)
    of_digits, of_directions = moving.read_clips(judge, videos)
    shares = {"digits": of_digits, "directions": of_directions}
    return {
        **asdict(Mode()),
        "clips": count,
        **{key: [round(x, 3) for x in (p.argmax(-1).bincount(minlength=p.shape[1]) / count).tolist()] for key, p in shares.items()},
        "frames_of_one_digit": round(float(moving.one_digit_share(judge, videos).mean()), 4),
        "motion": round(float(mean_frame_difference(videos).mean()), 4),
    }


@torch.no_grad()
def measure_vae(clips: Clips, vae: nn.Module) -> dict:
    """Reconstruction error of held-out clips, in pixel values 0..1, and the spread of their standardized latents."""
    latents = encode(vae, clips.videos)
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(50)]).transpose(1, 2) / 2 + 0.5
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    standard = (latents - mean) / std
    return {
        "held_out_rmse": round(float((decoded - clips.videos).square().mean().sqrt()), 4),
        "latent_mean": round(float(standard.mean()), 3),
        "latent_std": round(float(standard.std()), 3),
    }


def measure(data: Data, directory: Path, settings: Settings) -> dict:
    """Every figure of the model card, from the files in the directory."""
    pipeline, count, seed = digits.load_pipeline(directory), settings.quality_samples, settings.seed + 100
    real = held_out_clips(data, seed)
    prompts, labels, directions = every_prompt(count)
    return {
        "vae": measure_vae(real, pipeline.vae),
        "held_out_clips": judge_clips(real, directory),
        "prompts": [
            {**asdict(mode), **judge_clips(Clips(sample(pipeline, prompts, mode, seed), labels, directions), directory)}
            for mode in MODES
        ],
        "plain_prompt": measure_plain_prompt(pipeline, directory, count, seed),
        "cpu_seconds": json.loads((directory / "state" / "seconds.json").read_text()),
    }


# ---------------------------------------------------------------------------------------------------------- model card


CARD = """---
library_name: diffusers
pipeline_tag: text-to-video
---
# Moving digits: a Wan pipeline small enough for tests

A flow-matching text-to-video model in the layout of Wan 2.1 (`WanPipeline`: causal VAE, UMT5 text encoder, Wan's transformer,
UniPC scheduler of shift {shift:g}) that draws clips of {frames} frames of 32 x 32 pixels, in which a handwritten digit moves left, right,
up or down; trained from nothing. With it come two classifiers of clips. It exists to run and test reinforcement learning of video models
on a laptop's CPU; it is of no use as a generator of anything else.

```python
from rlr_trainer.digits import load_pipeline
from rlr_trainer.digits.moving import SIZE, load_moving_classifier, moving_prompt, read_clips

pipeline = load_pipeline("moving-digits")
clips = pipeline([moving_prompt(3, "left")] * 4, num_inference_steps=10, guidance_scale=1.0, output_type="pt", **SIZE).frames
digits, directions = read_clips(load_moving_classifier("judge"), clips)
```

Prompts: "a handwritten digit three moving left"; digit, direction, and "moving" with it may be left out. `WanPipeline` fills encoded
prompts with zero rows, to {rows} by default. It was trained with {tokens} to {rows}, and `load_pipeline` keeps to {tokens}, which costs less.

## Files

| file | content |
|---|---|
| `pipeline/` | the pipeline in diffusers' layout, loaded as float32; transformer and VAE are stored in float16 |
| `reward.safetensors` | convolutions on frames and on pairs of frames, {reward:,} parameters: the reward |
| `judge.safetensors` | patch-mixing network and a recurrent one over the frames, {judge:,} parameters: only judges |
| `quality.json` | every figure below, with the settings |

Parameters: transformer {transformer:,}, text encoder {text_encoder:,}, VAE {vae:,}.

## Data

The 1,797 digits that scikit-learn ships (`sklearn.datasets.load_digits`): the test set of *Optical Recognition of
Handwritten Digits*, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, licensed CC BY 4.0. Changes: 8 x 8 grey values enlarged to {digit} x {digit} by bicubic interpolation,
moved over a canvas of 32 x 32 at {slow:g} to {fast:g} pixels per frame by bilinear interpolation, and repeated over three colours.
{train:,} digits were trained on; {held_out} (stratified, fixed) were held out, the same as for the other models.

## Training

```
{command}
```

CPU seconds: {seconds}. Threads: {threads}. Steps: VAE {vae_steps:,}, reward {reward_steps:,}, judge {judge_steps:,}, transformer with text
encoder {flow_steps:,}, of batch {batch_size}, the VAE's of a quarter of it (AdamW, cosine decay; for transformer and text encoder an
exponential average of the weights). Noise levels are those of the scheduler's shift; the network learns the velocity. Prompts: 10 % empty;
of the others 20 % without a digit, and 20 % without a direction.

Versions: {versions}.
The seeds are fixed, but other versions and machines round and draw differently: another run gives weights of like
quality, not the same bits.

## Quality

Share of clips read as asked, by prompts that name digit and direction, equally many of each pair; frames of one digit: share of a
clip's frames that show its most frequent digit; motion: mean difference of neighbouring frames:

{quality_table}

"{plain}", {plain_clips} clips, 10 steps, no guidance, as the judge reads them: digits {plain_digits}; directions
{plain_directions}; frames of one digit {plain_one}, motion {plain_motion}.

Reconstruction of held-out clips by the VAE: root mean square error {rmse}, where black to white is 1.

## Limits

Over a thousand digits seen hundreds of times: samples may repeat training digits. Other words than those of the
training prompts are tokenized but mean nothing to the model.
"""


def quality_row(name: str, judged: dict) -> list:
    shares = [percent(judged[classifier][key]) for classifier in MOVING_CLASSIFIERS for key in ("digit", "direction")]
    return [name, judged["clips"], *shares, percent(judged["judge"]["frames_of_one_digit"]), judged["motion"]]


def write_card(directory: Path, quality: dict) -> None:
    """The model card, from the figures in `quality.json`."""
    plain, settings = quality["plain_prompt"], quality["settings"]
    header = ["clips", "number", *(f"{key}, {name}" for name in MOVING_CLASSIFIERS for key in ("digit", "direction"))]
    rows = [quality_row(f"{mode['steps']} steps, guidance {mode['guidance']:g}", mode) for mode in quality["prompts"]]
    card = CARD.format(
        **{key: settings[key] for key in ("vae_steps", "reward_steps", "judge_steps", "flow_steps", "batch_size", "threads")},
        **quality["parameters"],
        **{"shift": SHIFT, "frames": FRAMES, "rows": PIPELINE_ROWS, "tokens": TOKENS, "digit": DIGIT_PIXELS},
        **{"slow": SPEEDS[0], "fast": SPEEDS[1], "train": quality["data"]["train"], "held_out": quality["data"]["held_out"]},
        command=quality["command"],
        versions=", ".join(f"{name} {number}" for name, number in quality["versions"].items()),
        seconds=", ".join(f"{name} {number:,.0f}" for name, number in quality["cpu_seconds"].items()),
        quality_table=table(
            [*header, "frames of one digit", "motion"], [*rows, quality_row("held-out real clips", quality["held_out_clips"])]
        ),
        plain=moving.moving_prompt(),
        plain_clips=plain["clips"],
        plain_digits=", ".join(f"{name} {percent(x)}" for name, x in zip(digits.DIGIT_NAMES, plain["digits"], strict=True)),
        plain_directions=", ".join(f"{name} {percent(x)}" for name, x in zip(DIRECTIONS, plain["directions"], strict=True)),
        plain_one=percent(plain["frames_of_one_digit"]),
        plain_motion=plain["motion"],
        rmse=quality["vae"]["held_out_rmse"],
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- program


def train(data: Data, directory: Path, settings: Settings) -> dict[str, int]:
    """Train every part and write it; returns the parameter counts of the parts."""
    from transformers import CLIPTokenizer

    state = directory / "state"
    runner = Runner(state, Log(directory / "log.jsonl"), settings.minutes)
    trainings = [train_vae(data, settings), train_reward(data, settings), train_judge(data, settings)]
    for training in trainings:
        runner.run(training)
    vae, *classifiers = (training.module for training in trainings)
    for name, classifier in zip(MOVING_CLASSIFIERS, classifiers, strict=True):
        save_file(classifier.state_dict(), directory / f"{name}.safetensors")
    pool = load_pool(state / "pool.pt", lambda: make_pool(data, vae, settings))
    vae.register_to_config(latents_mean=pool["mean"].tolist(), latents_std=pool["std"].tolist())
    write_tokenizer(directory / "pipeline" / "tokenizer", TOKENS, WORDS)
    tokenizer = CLIPTokenizer.from_pretrained(str(directory / "pipeline" / "tokenizer"))
    training, transformer, text_encoder = train_flow(tokenizer, pool, settings)
    runner.run(training)
    transformer.set_attn_processor(WeightedRows().own)
    (state / "seconds.json").write_text(json.dumps(runner.seconds) + "\n")
    parts = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    parts |= dict(zip(MOVING_CLASSIFIERS, classifiers, strict=True))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    save_pipeline(directory / "pipeline", vae, text_encoder, transformer, tokenizer)
    return counts


if __name__ == "__main__":
    run("pretrain_moving.py", __doc__.splitlines()[0], Settings(), QUICK, train, measure, write_card, load_data)
