"""The loss of the preset algo=grpo, put together from its parts as the method is."""

from __future__ import annotations

from grpo_safe.algorithm.losses import LossFn, clip, k3, policy_gradient, sequence_mean


def grpo_loss(clip_eps: float, kl_coef: float, entropy_coef: float) -> LossFn:
    """GRPO (arXiv 2402.03300, eq. 3): the mean over completions of the mean over tokens of
    -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + kl_coef k3 - entropy_coef H.
    """
    return policy_gradient(clip(clip_eps, clip_eps), sequence_mean, k3, kl_coef, entropy_coef)
