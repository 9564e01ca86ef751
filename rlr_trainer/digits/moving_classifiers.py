"""The two classifiers of moving digits: which digit each frame shows, and which way it moves.

As those of pictures, they share no architecture, seed or training recipe. The reward is convolutional and sees motion between
neighbouring frames; the judge mixes patches of a frame and reads the frames in their order.

Shape suffixes: B videos, F frames, N = B F frames of all videos, P patches, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlr_trainer.digits.classifiers import NUM_CLASSES, MixerBlock, to_grey

DIRECTIONS = ("left", "right", "up", "down")
PIXELS = 32


class MovingClassifier(nn.Module):
    """Forward: videos [B, F, 3, H, W] float in [0, 1], of at least 2 frames -> digit logits [B, F, 10], direction logits [B, 4]."""

    def read_frames(self, frames: Tensor) -> Tensor:
        """Digit logits [N, 10] of frames [N, 3, H, W]."""
        raise NotImplementedError

    def read_directions(self, videos: Tensor) -> Tensor:
        """Direction logits [B, 4], in the order of `DIRECTIONS`, of videos [B, F, 3, H, W]."""
        raise NotImplementedError

    def forward(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        check_videos(videos)
        return self.read_frames(videos.flatten(0, 1)).unflatten(0, videos.shape[:2]), self.read_directions(videos)


class MovingReward(MovingClassifier):
    """Convolutions on single frames for the digit and on pairs of neighbours for the direction; smooth, without normalisation layers."""

    def __init__(self) -> None:
        super().__init__()
        self.frame = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.SiLU()),  # 16 x 16
            *(nn.Conv2d(16, 32, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2)),  # 8 x 8
            *(nn.Conv2d(32, 48, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2)),  # 4 x 4
            *(nn.Flatten(), nn.Linear(48 * 16, 64), nn.SiLU(), nn.Linear(64, NUM_CLASSES)),
        )
        self.pair = nn.Sequential(
            *(nn.Conv2d(2, 16, 5, stride=2, padding=2), nn.SiLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, len(DIRECTIONS))),
        )

    def read_frames(self, frames: Tensor) -> Tensor:
        return self.frame(to_grey(frames, PIXELS))

    def read_directions(self, videos: Tensor) -> Tensor:
        """The mean over all pairs of neighbouring frames of their logits."""
        grey = to_grey(videos.flatten(0, 1), PIXELS).unflatten(0, videos.shape[:2])
        pairs = torch.cat([grey[:, :-1], grey[:, 1:]], dim=2)
        return self.pair(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2]).mean(1)


class MovingJudge(MovingClassifier):
    """Patches mixed without convolutions for the digit; a recurrent network over the frames' features for the direction."""

    patch = 4

    def __init__(self) -> None:
        super().__init__()
        channels, patches = 48, (PIXELS // self.patch) ** 2
        self.embed = nn.Linear(self.patch**2, channels)
        self.position = nn.Parameter(torch.zeros(1, patches, channels))
        self.blocks = nn.Sequential(*[MixerBlock(patches, channels) for _ in range(3)])
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(patches * 8, 64)
        self.narrow = nn.Linear(channels, 8)
        self.head = nn.Linear(64, NUM_CLASSES)
        self.see = nn.Sequential(nn.Linear(patches, 64), nn.GELU())
        self.recur = nn.GRU(64, 48, batch_first=True)
        self.steer = nn.Linear(48, len(DIRECTIONS))

    def read_frames(self, frames: Tensor) -> Tensor:
        patches_NPD = _patches(frames, PIXELS, self.patch)
        tokens_NPD = self.blocks(self.embed(patches_NPD) + self.position)
        return self.head(F.gelu(self.project(self.narrow(self.norm(tokens_NPD)).flatten(1))))

    def read_directions(self, videos: Tensor) -> Tensor:
        """Of the frames in 8 x 8 pixels, each the mean of a patch: where the digit is, not which."""
        coarse_NP = _patches(videos.flatten(0, 1), PIXELS, self.patch).mean(-1)
        states, _ = self.recur(self.see(coarse_NP).unflatten(0, videos.shape[:2]))
        return self.steer(states[:, -1])


def _patches(frames: Tensor, resolution: int, patch: int) -> Tensor:
    """Patches [N, P, patch^2] of grey frames, row by row."""
    return F.unfold(to_grey(frames, resolution), kernel_size=patch, stride=patch).transpose(1, 2)


def check_videos(videos: Tensor) -> None:
    """ValueError unless videos [B, F >= 2, 3, H, W]; `to_grey` checks the rest."""
    if videos.dim() != 5 or videos.shape[1] < 2:
        raise ValueError(
            f"videos has shape {tuple(videos.shape)}: must be [B, F, 3, H, W] with at least 2 frames; a pipeline makes them with "
            "output_type='pt'"
        )


MOVING_CLASSIFIERS: dict[str, type[MovingClassifier]] = {"reward": MovingReward, "judge": MovingJudge}
