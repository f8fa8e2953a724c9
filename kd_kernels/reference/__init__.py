"""Every formula once, plainly, in torch: the oracle of the tests and the backend that is always there."""

from kd_kernels.reference.dense import dense_distill, divergence
from kd_kernels.reference.row_divergence import row_divergence

__all__ = ["dense_distill", "divergence", "row_divergence"]
