"""Frechet distance of two Gaussians."""

import torch
from torch import Tensor


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
