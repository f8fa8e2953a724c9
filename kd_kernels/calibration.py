"""Whether a model is right as often as it claims."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class Calibration(NamedTuple):
    """Reliability by equal-width bins of confidence; float64. ``[bins]`` tensors are 0 in empty bins."""

    ece: Tensor
    """Expected calibration error, 0-d: mean over tokens of their bin's |accuracy - confidence|; 0 without
    tokens."""
    mce: Tensor
    """Maximum calibration error, 0-d: the largest |accuracy - confidence| of a bin that holds a token."""
    bin_confidence: Tensor
    """``[bins]``: mean confidence."""
    bin_accuracy: Tensor
    """``[bins]``: share of correct predictions."""
    bin_count: Tensor
    """``[bins]`` int64: tokens."""


def calibration(
    confidence: Tensor, correct: Tensor, bins: int = 15, mask: Optional[Tensor] = None
) -> Calibration:
    """Calibration errors of predictions, ``kd.calibration(m.confidence, m.correct, mask=scores.counted)``.

    Bin m of M holds the confidences in ((m - 1) / M, m / M]; the first holds 0 too.

    Source: Guo, Pleiss, Sun, Weinberger 2017, "On Calibration of Modern Neural Networks", equations 2 to 5.

    Args:
        confidence: floating, any shape: the probability of the predicted token, in [0, 1].
        correct: bool, same shape: whether the prediction was right.
        bins: >= 1.
        mask: bool, same shape; True = counts. What is masked out is never read.

    Raises:
        ValueError, TypeError: an argument that does not fit, a confidence outside [0, 1] or NaN included.
    """
    _check(confidence, correct, bins, mask)
    if mask is not None:
        confidence, correct = confidence[mask], correct[mask]
    confidence, correct = (x.detach().reshape(-1).to(torch.float64) for x in (confidence, correct))
    inside = (confidence >= 0) & (confidence <= 1)
    if not bool(inside.all()):
        raise ValueError(f"confidence must be in [0, 1], got {confidence[~inside][0].item()}")

    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    index = torch.bucketize(confidence, edges)  # edges[i - 1] < confidence <= edges[i]

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(bins).index_add_(0, index, values)

    count = total(torch.ones_like(index))
    bin_confidence, bin_accuracy = (total(x) / count.clamp(min=1) for x in (confidence, correct))
    gap = (bin_accuracy - bin_confidence).abs()  # 0 in empty bins
    ece = (gap * count).sum() / count.sum().clamp(min=1)
    return Calibration(ece, gap.amax(), bin_confidence, bin_accuracy, count)


def _check(confidence: Tensor, correct: Tensor, bins: int, mask: Optional[Tensor]) -> None:
    for name, value in (("confidence", confidence), ("correct", correct), ("mask", mask)):
        if value is None and name == "mask":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.shape != confidence.shape:
            raise ValueError(
                f"{name} must have the shape of confidence, {tuple(confidence.shape)}; "
                f"got {tuple(value.shape)}"
            )
        if name != "confidence" and value.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {value.dtype}; use {name}.bool()")
    if not confidence.is_floating_point():
        raise TypeError(f"confidence must be floating, got {confidence.dtype}")
    if isinstance(bins, bool) or not isinstance(bins, int):
        raise TypeError(f"bins must be an int, got {bins!r}")
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
