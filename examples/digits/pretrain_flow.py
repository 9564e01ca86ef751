"""Train the bundled flow-matching digits model from nothing: VAE, two text encoders and an MMDiT, then measure them.

    python examples/digits/pretrain_flow.py --output_dir runs/digits-flow      # about half an hour on one CPU core
    python examples/digits/pretrain_flow.py --output_dir runs/quick --quick    # seconds: shows that it runs, learns nothing

Needs, data and layout of the output are those of `pretrain.py`, from which this program imports what they share. The
classifiers are not trained again: the bundled ones reward and judge both models.

Flow matching: x_sigma = (1 - sigma) x0 + sigma x1 with x0 a latent, x1 noise, and the network learns v = x1 - x0.

Shape suffixes: N pictures, B batch, C channels, H x W latent pixels, S context rows, E text features.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pretrain import (
    PIXELS,
    Average,
    Data,
    choose_prompts,
    cosine_schedule,
    fit_vae,
    judge_named,
    judge_plain,
    measure_frechet_of_real,
    measure_vae,
    percent,
    prompt_table,
    rewrite_tokenizer,
    run,
    table,
    write_text_encoder,
    write_tokenizer,
)
from torch import Tensor, nn
from tqdm.auto import tqdm

from rlr_trainer import digits
from rlr_trainer.digits.classifiers import CLASSIFIERS

TOKENS = 16  # length of every encoded prompt; the longest training prompt has 6
TEXT_WIDTH = 32  # of one text encoder
WIDTH = 96  # of the transformer
T5_ROWS = 256  # zero rows that StableDiffusion3Pipeline adds by default where it has no T5
SHIFT = 1.0


@dataclass(frozen=True)
class Settings:
    """Lengths of the training, and what else changes its result. The defaults make the shipped weights."""

    seed: int = 0
    vae_steps: int = 1000
    flow_steps: int = 8000
    batch_size: int = 64
    quality_samples: int = 1000
    threads: int = 1  # their number changes the order of sums


QUICK = Settings(vae_steps=2, flow_steps=2, batch_size=8, quality_samples=20)


# ------------------------------------------------------------------------------------------------------------ networks


def make_vae() -> nn.Module:
    """As the first model's, without the 1 x 1 convolutions around the latents, which Stable Diffusion 3's lacks."""
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
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@torch.no_grad()
def standardize_latents(vae: nn.Module, images: Tensor) -> None:
    """Give every latent channel the same spread, and the VAE the shift and scale that make it N(0, 1) over all channels."""
    latents = vae.encode(images).latent_dist.mean
    std = latents.std(dim=(0, 2, 3))
    gain = 1 / std  # folded into the convolutions beside the latents, so pictures stay the same
    channels = len(gain)
    last, first = vae.encoder.conv_out, vae.decoder.conv_in  # rows of the last: means, then log-variances
    last.weight[:channels] *= gain.view(-1, 1, 1, 1)
    last.bias[:channels] *= gain
    last.bias[channels:] += 2 * gain.log()
    first.weight /= gain.view(1, -1, 1, 1)
    latents = latents * gain.view(1, -1, 1, 1)
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))


def make_text_encoder(tokenizer) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_transformer() -> nn.Module:
    """Stable Diffusion 3's MMDiT on a grid of 4 x 4 patches, every block and the whole network zero at first (as DiT begins)."""
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=PIXELS // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=WIDTH // 4,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=PIXELS // 4,
    )
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    modulations += [block.norm1_context.linear for block in transformer.transformer_blocks]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def make_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


# ------------------------------------------------------------------------------------------------------------ training


def train_vae(data: Data, settings: Settings) -> nn.Module:
    torch.manual_seed(settings.seed + 3)
    vae = make_vae()
    fit_vae(vae, data, settings.vae_steps, settings.batch_size, settings.seed + 3)
    vae.eval().requires_grad_(False)
    standardize_latents(vae, 2 * data.train_images - 1)
    return vae


class MaskedJointAttention:
    """Joint attention of picture and context with a mask, which diffusers' own processor leaves out.

    Called as an attention processor: hidden_states [B, P, D], encoder_hidden_states [B, S, D], attention_mask [B, 1, 1,
    P + S] that is added to the logits -> ([B, P, D], [B, S, D]).
    """

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor):
        def project(of_picture: nn.Module, of_context: nn.Module) -> Tensor:
            both = torch.cat([of_picture(hidden_states), of_context(encoder_hidden_states)], dim=1)
            return both.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key = project(attn.to_q, attn.add_q_proj), project(attn.to_k, attn.add_k_proj)
        value = project(attn.to_v, attn.add_v_proj)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask).transpose(1, 2).flatten(2)
        picture, context = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](picture), context if attn.context_pre_only else attn.to_add_out(context)


def predict_velocity(transformer: nn.Module, noisy: Tensor, sigmas: Tensor, text: Tensor, pooled: Tensor, rows: Tensor) -> Tensor:
    """The network's output with `rows` zero rows after the text, computed with one.

    Zero rows have no position, so they stay equal to each other in every layer. One row whose attention logit is raised
    by log(n) therefore does what n of them do. The network must carry `MaskedJointAttention`.

    Args:
        noisy: [B, C, H, W] at noise levels sigmas [B] in [0, 1].
        text: [B, S, E] rows of the text encoders, pooled [B, E] their summary.
        rows: [B] numbers of zero rows, as floats; 0 is none.
    """
    context = F.pad(text, (0, 0, 0, 1))
    patches = (noisy.shape[-1] // transformer.config.patch_size) ** 2
    mask = F.pad(rows.log().view(-1, 1, 1, 1), (patches + text.shape[1], 0))
    options = {"attention_mask": mask}
    return transformer(noisy, context, pooled, 1000 * sigmas, joint_attention_kwargs=options, return_dict=False)[0]


def encode_table(encoders: list[nn.Module], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What `StableDiffusion3Pipeline` makes of tokens [P, S]: second to last states [P, S, E] and pooled [P, E], joined."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), torch.cat([o.text_embeds for o in outputs], dim=-1)


def choose_rows(count: int, generator: torch.Generator) -> Tensor:
    """Numbers of zero rows [count]: 256 for half of them, the pipeline's default; else none or log-uniform up to that."""
    draw = torch.rand(count, generator=generator)
    fewer = (draw * 4 * math.log(T5_ROWS)).exp().floor()
    return torch.where(draw < 0.25, fewer, torch.where(draw < 0.5, 0.0, float(T5_ROWS)))


def train_flow(data: Data, vae: nn.Module, tokenizer, settings: Settings) -> tuple[nn.Module, list[nn.Module]]:
    """Transformer and both text encoders together, by the flow-matching loss; all come back as averages over the training."""
    torch.manual_seed(settings.seed + 5)
    generator = torch.Generator().manual_seed(settings.seed + 5)
    transformer, encoders = make_transformer(), [make_text_encoder(tokenizer) for _ in range(2)]
    own_processors = transformer.attn_processors
    transformer.set_attn_processor(MaskedJointAttention())
    modules = [transformer, *encoders]
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=1e-2)
    schedule = cosine_schedule(optimizer, settings.flow_steps)
    average = Average(modules)
    tokens = tokenizer(prompt_table(), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        latents_NCHW = vae.encode(2 * data.train_images - 1).latent_dist.mean
        latents_NCHW = (latents_NCHW - vae.config.shift_factor) * vae.config.scaling_factor
    for _ in tqdm(range(settings.flow_steps), desc="text encoders and transformer"):
        index = torch.randint(len(latents_NCHW), (settings.batch_size,), generator=generator)
        clean = latents_NCHW[index]
        # stratified times: each batch covers the whole path, which lowers the variance of the loss
        sigmas = (torch.arange(len(index)) + torch.rand(len(index), generator=generator)) / len(index)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = clean.lerp(noise, sigmas.view(-1, 1, 1, 1))
        text, pooled = encode_table(encoders, tokens)
        prompts = choose_prompts(data.train_labels[index], generator)
        rows = choose_rows(len(index), generator)
        predicted = predict_velocity(transformer, noisy, sigmas, text[prompts], pooled[prompts], rows)
        loss = F.mse_loss(predicted, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
    average.write_back()
    transformer.set_attn_processor(own_processors)
    return transformer.eval(), [encoder.eval() for encoder in encoders]


def save_pipeline(directory: Path, vae: nn.Module, encoders: list[nn.Module], transformer: nn.Module, tokenizer) -> None:
    """The pipeline in diffusers' layout; precisions and files as in `pretrain.save_pipeline`."""
    from diffusers import StableDiffusion3Pipeline

    encoders = [encoder.half().float() for encoder in encoders]
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.half(),
        scheduler=make_scheduler(),
        vae=vae.half(),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(directory)
    for encoder, suffix in zip(encoders, ("", "_2"), strict=True):
        write_text_encoder(encoder, directory / f"text_encoder{suffix}")
        rewrite_tokenizer(directory / f"tokenizer{suffix}", TOKENS)


# ------------------------------------------------------------------------------------------------------------- quality


def noisy_scheduler(scheduler, noise: float):
    """The scheduler with noise in every step (Flow-CPS): 0 is the Euler ODE, 1 is diffusers' `stochastic_sampling`.

    A step from sigma to sigma' keeps the level of noise: x' = (1 - sigma') x0 + sqrt(sigma'^2 - s^2) x1 + s n, where x0 and
    x1 are what the network takes the latent apart into, n is fresh noise and s = sigma' sin(noise pi / 2).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    class FlowCPS(FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            if self.step_index is None:
                self._init_step_index(timestep)
            sigma, following = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
            clean, old_noise = sample - sigma * model_output, sample + (1 - sigma) * model_output
            angle = torch.tensor(noise * math.pi / 2)
            mixed = angle.cos() * old_noise + angle.sin() * torch.randn(sample.shape, generator=self.generator)
            self._step_index += 1
            return ((1 - following) * clean + following * mixed,)

    made = FlowCPS.from_config(scheduler.config)
    made.generator = torch.Generator().manual_seed(0)
    return made


@dataclass(frozen=True)
class Mode:
    """How pictures are drawn: `noise` as in `noisy_scheduler`, `rows` of zeros in place of T5."""

    steps: int = 10
    guidance: float = 1.0
    noise: float = 0.0
    rows: int = T5_ROWS


MODES = (
    Mode(),
    Mode(rows=0),
    Mode(rows=0, noise=0.8),
    Mode(rows=0, noise=1.0),
    Mode(rows=0, guidance=3.0),
    Mode(rows=0, guidance=3.0, noise=0.8),
    Mode(rows=0, guidance=7.0),
    Mode(rows=0, steps=50),
)


@torch.no_grad()
def sample(pipeline, prompts: list[str], mode: Mode, seed: int, batch: int = 100) -> Tensor:
    """Pictures [N, 3, 32, 32] in [0, 1] for the prompts, by the pipeline's own call."""
    own, pipeline.scheduler = pipeline.scheduler, noisy_scheduler(pipeline.scheduler, mode.noise)
    generator = pipeline.scheduler.generator.manual_seed(seed)
    options = {"num_inference_steps": mode.steps, "guidance_scale": mode.guidance, "max_sequence_length": mode.rows}
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        images.append(pipeline(part, generator=generator, output_type="pt", **options).images.float())
    pipeline.scheduler = own
    return torch.cat(images)


def measure_class_prompts(pipeline, mode: Mode, count: int, seed: int) -> dict:
    """How well the pipeline draws "a handwritten digit <name>"."""
    labels = torch.arange(count) % 10
    images = sample(pipeline, [digits.class_prompt(int(d)) for d in labels], mode, seed)
    return {**asdict(mode), "samples": count, **judge_named(images, labels, digits.WEIGHTS)}


def measure_plain_prompt(pipeline, mode: Mode, count: int, seed: int) -> dict:
    """What the plain prompt of the demo draws before any fine-tuning."""
    images = sample(pipeline, [digits.PROMPT] * count, mode, seed)
    return {**asdict(mode), "samples": count, **judge_plain(images, digits.WEIGHTS)}


def measure(data: Data, directory: Path, settings: Settings) -> dict:
    """Every figure of the model card, from the files in the directory."""
    pipeline, count, seed = digits.load_pipeline(directory), settings.quality_samples, settings.seed + 100
    return {
        "vae": measure_vae(data, pipeline.vae),
        "frechet_of_held_out_digits": measure_frechet_of_real(data, digits.WEIGHTS),
        "class_prompts": [measure_class_prompts(pipeline, mode, count, seed) for mode in tqdm(MODES, desc="quality")],
        "plain_prompt": [measure_plain_prompt(pipeline, Mode(rows=0, noise=noise), count, seed) for noise in (0.0, 0.8)],
    }


# ---------------------------------------------------------------------------------------------------------- model card


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
# Handwritten digits by flow matching: a Stable Diffusion 3 pipeline small enough for tests

A flow-matching model in the layout of Stable Diffusion 3 (`StableDiffusion3Pipeline`: VAE, two CLIP text encoders, no
T5, MMDiT, Euler scheduler of shift {shift:g}) that draws 32 x 32 pictures of digits, trained from nothing. It is the twin
of the bundled Stable Diffusion 1 model (`../weights/README.md`), with which it shares data, prompts and classifiers. It
exists to run and test reinforcement learning of flow models on a laptop's CPU; it is of no use as a generator of
anything else.

```python
from rlr_trainer.digits import class_prompt, frechet_distance, load_classifier, load_pipeline

pipeline = load_pipeline("digits-flow")
images = pipeline([class_prompt(7)] * 20, num_inference_steps=10, guidance_scale=1.0, output_type="pt").images
load_classifier("judge")(images).softmax(-1)[:, 7], frechet_distance(images, digit=7)
```

`StableDiffusion3Pipeline` appends `max_sequence_length` zero rows to the encoded prompt where it has no T5: 256 by
default, eight times the rest of this model's input. It was trained with 0 to 256 of them, so that
`max_sequence_length=0` gives the same quality in a fraction of the time.

## Files

| file | content |
|---|---|
| `pipeline/` | the pipeline in diffusers' layout, loaded as float32; MMDiT and VAE are stored in float16 |
| `quality.json` | every figure below, with the settings |

Parameters: MMDiT {transformer:,}, text encoders {text_encoders:,}, VAE {vae:,}.

## Data

The 1,797 digits that scikit-learn ships (`sklearn.datasets.load_digits`): the test set of *Optical Recognition of
Handwritten Digits*, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, licensed CC BY 4.0. Changes: 8 x 8 grey values enlarged to 32 x 32 by bicubic
interpolation and repeated over three colours. {train:,} digits were trained on; {held_out} (stratified, fixed) were held
out, the same as for the other models.

## Training

```
{command}
```

{seconds:.0f} seconds on {threads} of two CPU cores, which other work shared, measurements included. Prompts: "a
handwritten digit <name>" 75 %, "a handwritten digit" 15 %, empty 10 % (for classifier-free guidance). Steps: VAE
{vae_steps:,}, MMDiT with text encoders {flow_steps:,}, of batch {batch_size} (AdamW, cosine decay; for MMDiT and text
encoders an exponential average of the weights). Noise levels are uniform in [0, 1]; the network learns the velocity.

Versions: {versions}.
The seeds are fixed, but other versions and machines round and draw differently: another run gives weights of like
quality, not the same bits.

## Quality

Pictures from "a handwritten digit <name>", equally many of each class, share read as asked. Noise: 0 is the scheduler's
own Euler method, 1 its `stochastic_sampling`, between them Flow-CPS. Rows: `max_sequence_length`.

{prompt_table}

Frechet distance to the real digits of the class (judge's features, 16 principal components):

{frechet_table}

"a handwritten digit", {plain_samples} pictures, 10 steps, no guidance: share of each class

{plain_table}

{plain_text}

Reconstruction of held-out digits by the VAE: root mean square error {rmse}, where black to white is 1.

## Limits

Over a thousand digits seen hundreds of times: samples may repeat training pictures. Other words than those of the
training prompts are tokenized but mean nothing to the model.
"""


def describe(mode: dict) -> str:
    return f"{mode['steps']} steps, guidance {mode['guidance']:g}, noise {mode['noise']:g}, rows {mode['rows']}"


def write_card(directory: Path, quality: dict) -> None:
    """The model card, from the figures in `quality.json`."""
    modes, plain = quality["class_prompts"], quality["plain_prompt"]
    nothing = ["-"] * 10
    distances = [[describe(mode), *mode.get("frechet_per_class", nothing)] for mode in modes]
    shares = [
        [f"noise {mode['noise']:g}, {name}", *map(percent, mode[name]["share_per_class"])] for mode in plain for name in CLASSIFIERS
    ]
    sevens = [
        f'Noise {mode["noise"]:g}: mean probability of "seven" {mode["reward"]["mean_probability_of_seven"]:.3f} by the reward, '
        f"{mode['judge']['mean_probability_of_seven']:.3f} by the judge; Frechet distance of these pictures to the real sevens "
        f"{mode.get('frechet_to_seven', '-')}."
        for mode in plain
    ]
    card = CARD.format(
        **{key: quality["settings"][key] for key in ("vae_steps", "flow_steps", "batch_size", "threads")},
        **quality["parameters"],
        shift=SHIFT,
        train=quality["data"]["train"],
        held_out=quality["data"]["held_out"],
        command=quality["command"],
        versions=", ".join(f"{name} {number}" for name, number in quality["versions"].items()),
        seconds=quality["seconds"],
        prompt_table=table(
            ["settings", "pictures", *CLASSIFIERS],
            [[describe(mode), mode["samples"], *(percent(mode[c]) for c in CLASSIFIERS)] for mode in modes],
        ),
        frechet_table=table(
            ["pictures", *range(10)], [*distances, ["held-out real digits", *quality["frechet_of_held_out_digits"]]]
        ),
        plain_samples=plain[0]["samples"],
        plain_table=table(["pictures, classifier", *range(10)], shares),
        plain_text="\n".join(sevens),
        rmse=quality["vae"]["held_out_rmse"],
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- program


def train(data: Data, directory: Path, settings: Settings) -> dict[str, int]:
    """Train every part and write it; returns the parameter counts of the pipeline's parts."""
    from transformers import CLIPTokenizer

    vae = train_vae(data, settings)
    write_tokenizer(directory / "pipeline" / "tokenizer", TOKENS)
    tokenizer = CLIPTokenizer.from_pretrained(str(directory / "pipeline" / "tokenizer"))
    transformer, encoders = train_flow(data, vae, tokenizer, settings)
    parts = {"transformer": [transformer], "text_encoders": encoders, "vae": [vae]}
    counts = {name: sum(p.numel() for part in group for p in part.parameters()) for name, group in parts.items()}
    save_pipeline(directory / "pipeline", vae, encoders, transformer, tokenizer)
    return counts


if __name__ == "__main__":
    run("pretrain_flow.py", __doc__.splitlines()[0], Settings(), QUICK, train, measure, write_card)
