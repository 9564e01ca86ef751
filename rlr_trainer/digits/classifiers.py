"""The two classifiers of the bundled digits: one to be rewarded by, one to judge with.

They share no architecture, resolution, seed or training recipe, so that a picture which only looks like a seven to the
reward can be told from a seven.

Shape suffixes: B images, C = 3 colours, H x W pixels, F features, P patches, D channels of a patch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES = 10


def to_grey(images: Tensor, resolution: int) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> grey pictures [B, 1, resolution, resolution] in [-1, 1], differentiable."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images has shape {tuple(images.shape)} and dtype {images.dtype}: must be a floating-point tensor [B, 3, H, W] in "
            "[0, 1]; ask the pipeline for output_type='pt', or permute and divide 8-bit pictures by 255"
        )
    grey = images.mean(dim=1, keepdim=True)
    if grey.shape[-2:] != (resolution, resolution):
        # antialias: a smaller picture is an average over all pixels, so none of them is free to hide a perturbation
        grey = F.interpolate(grey, size=(resolution, resolution), mode="bilinear", antialias=True)
    return 2 * grey - 1


class DigitClassifier(nn.Module):
    """Forward: images [B, 3, H, W] float in [0, 1] -> logits [B, 10]."""

    resolution: int
    head: nn.Module

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features [B, 64] of images [B, 3, H, W]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class RewardClassifier(DigitClassifier):
    """A convolutional network on 32 x 32 pixels, made to be differentiated through: smooth, no normalisation layers."""

    resolution = 32

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),  # 16 x 16
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),  # 8 x 8
            nn.Conv2d(32, 48, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),  # 4 x 4
            nn.Flatten(),
            nn.Linear(48 * 16, 64),
            nn.SiLU(),
        )
        self.head = nn.Linear(64, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return self.body(to_grey(images, self.resolution))


class MixerBlock(nn.Module):
    """Residual MLPs across patches and across channels (MLP-Mixer, Tolstikhin et al. 2021); [B, P, D] -> [B, P, D]."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norm_patches = nn.LayerNorm(channels)
        self.mix_patches = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.norm_channels = nn.LayerNorm(channels)
        self.mix_channels = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        """Mixes across patches, then across channels; both are added to the input."""
        mixed_BDP = self.mix_patches(self.norm_patches(tokens_BPD).transpose(1, 2))
        tokens_BPD = tokens_BPD + mixed_BDP.transpose(1, 2)
        return tokens_BPD + self.mix_channels(self.norm_channels(tokens_BPD))


class JudgeClassifier(DigitClassifier):
    """A patch-mixing network without convolutions on 16 x 16 pixels, trained against attacks and against nonsense."""

    resolution = 16
    patch = 4

    def __init__(self) -> None:
        super().__init__()
        channels, patches = 64, (self.resolution // self.patch) ** 2
        self.embed = nn.Linear(self.patch**2, channels)
        self.position = nn.Parameter(torch.zeros(1, patches, channels))
        self.blocks = nn.Sequential(*[MixerBlock(patches, channels) for _ in range(3)])
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(patches * channels, 64)
        self.head = nn.Linear(64, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] -> [B, 64], of all patches together."""
        grey = to_grey(images, self.resolution)
        patches_BPD = F.unfold(grey, kernel_size=self.patch, stride=self.patch).transpose(1, 2)
        tokens_BPD = self.blocks(self.embed(patches_BPD) + self.position)
        return F.gelu(self.project(self.norm(tokens_BPD).flatten(1)))


CLASSIFIERS: dict[str, type[DigitClassifier]] = {"reward": RewardClassifier, "judge": JudgeClassifier}
