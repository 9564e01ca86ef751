"""Frechet distance between pictures and the real digits, in the judge's features.

Shape suffixes: N pictures, F features, K principal components, L = 10 classes.
"""

import torch
from torch import Tensor

NUM_COMPONENTS = 16
# Below this many pictures the covariance in 16 components is singular and the distance is mostly sampling error.
MIN_IMAGES = NUM_COMPONENTS + 1


def fit_statistics(features_NF: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """Principal components of the real digits' features and, for every class, mean and covariance in them.

    Args:
        features_NF: [N, F] features of real digits of all classes.
        labels_N: [N] classes 0..9.

    Returns:
        "mean" [F], "components" [F, K], "class_means" [L, K], "class_covariances" [L, K, K], "class_counts" [L];
        float64 but for the counts.
    """
    features_NF = features_NF.double()
    mean_F = features_NF.mean(dim=0)
    _, _, right_FF = torch.linalg.svd(features_NF - mean_F, full_matrices=False)
    components_FK = right_FF[:NUM_COMPONENTS].T.contiguous()
    projected_NK = (features_NF - mean_F) @ components_FK
    of_class = [projected_NK[labels_N == digit] for digit in range(10)]
    return {
        "mean": mean_F,
        "components": components_FK,
        "class_means": torch.stack([x.mean(dim=0) for x in of_class]),
        "class_covariances": torch.stack([torch.cov(x.T) for x in of_class]),
        "class_counts": torch.tensor([len(x) for x in of_class]),
    }


def gaussian_frechet_distance(mean_p: Tensor, covariance_p: Tensor, mean_q: Tensor, covariance_q: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, the quantity that FID reports.

    ||m_p - m_q||^2 + tr(C_p) + tr(C_q) - 2 tr((C_p^1/2 C_q C_p^1/2)^1/2)

    Args:
        mean_p, mean_q: [K].
        covariance_p, covariance_q: [K, K], symmetric and positive semi-definite.
    """
    values, vectors = torch.linalg.eigh(covariance_p)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_q @ root).clamp(min=0).sqrt().sum()
    distance = (mean_p - mean_q).square().sum() + covariance_p.trace() + covariance_q.trace() - 2 * cross
    return max(float(distance), 0.0)  # round-off may turn a distance of zero negative


def features_frechet_distance(features_NF: Tensor, digit: int, statistics: dict[str, Tensor]) -> float:
    """Frechet distance between features [N, F] and the real digits of one class; see `fit_statistics`."""
    projected_NK = (features_NF.double() - statistics["mean"]) @ statistics["components"]
    return gaussian_frechet_distance(
        projected_NK.mean(dim=0),
        torch.cov(projected_NK.T),
        statistics["class_means"][digit],
        statistics["class_covariances"][digit],
    )
