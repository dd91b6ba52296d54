"""Rotary position embedding (Su et al. 2021) and its scalings to longer texts.

Shapes: T tokens of a packed row, D width of a head.
"""

from __future__ import annotations

import math

import torch

from fm9g.config.model import ModelConfig


def _inverse_frequencies(theta: float | torch.Tensor, dim: int, device: torch.device) -> torch.Tensor:
    """theta^(-2i/D): (D/2,) for one theta, (T, D/2) for thetas of shape (T, 1)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (theta**exponents)


def _ntk_by_parts(config: ModelConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    """Keeps fast frequencies, divides slow ones by the factor and blends in between: NTK-by-parts and YaRN (Peng et al.
    2023, section 3.2)."""
    dim, theta = config.head_dim, config.rope_theta

    def index_of(rotations: float) -> float:  # of the frequency with this many rotations in the original length
        return dim * math.log(config.orig_max_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index_of(config.rope_beta_fast)), 0)
    high = min(math.ceil(index_of(config.rope_beta_slow)), dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32, device=inv_freq.device)
    slow = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq / config.rope_factor * slow + inv_freq * (1 - slow)


def _llama3(config: ModelConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    """Keeps fast frequencies, divides slow ones by the factor and blends in between, as Llama 3.1 does."""
    rotations = inv_freq * config.orig_max_length / (2 * math.pi)  # in the original length
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    fast = ((rotations - low) / (high - low)).clamp(0, 1)
    return inv_freq / config.rope_factor * (1 - fast) + inv_freq * fast


def rotary_cos_sin(
    config: ModelConfig, positions: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary angles.

    Args:
        positions: (T,) of each token in its document.
        cu_seqlens: (documents + 1,) borders of the documents.

    Returns:
        Two tensors (T, D), fp32.
    """
    kind, factor, dim, device = config.rope_scaling, config.rope_factor, config.head_dim, positions.device
    theta: float | torch.Tensor = config.rope_theta
    if kind == "ntk-aware":
        theta *= factor ** (dim / (dim - 2))
    elif kind == "dynamic ntk":
        # Each document is stretched by its own length, so that packing changes nothing.
        seqlens = cu_seqlens.diff().to(torch.float32)
        growth = (factor * seqlens / config.orig_max_length - (factor - 1)).clamp(min=1.0)
        stretched = theta * growth ** (dim / (dim - 2))
        theta = stretched.repeat_interleave(cu_seqlens.diff(), output_size=len(positions))[:, None]
    inv_freq = _inverse_frequencies(theta, dim, device)
    if kind == "linear":
        inv_freq = inv_freq / factor
    elif kind in ("ntk-by-parts", "yarn"):
        inv_freq = _ntk_by_parts(config, inv_freq)
    elif kind == "llama3":
        inv_freq = _llama3(config, inv_freq)
    angles = positions[:, None].to(torch.float32) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)  # (T, D)
    return angles.cos() * config.rotary_multiplier, angles.sin() * config.rotary_multiplier


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x (T, heads, D), in fp32, the first half of D paired with the second. Returns the dtype of x."""
    x_fp32 = x.float()
    left, right = x_fp32.chunk(2, dim=-1)
    rotated = x_fp32 * cos[:, None, :] + torch.cat((-right, left), dim=-1) * sin[:, None, :]
    return rotated.to(x.dtype)
