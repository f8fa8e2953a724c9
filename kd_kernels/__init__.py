"""Fused knowledge-distillation losses from hidden states and LM-head weights.

``import kd_kernels as kd``; see :func:`kd_kernels.distill`.
"""

from pathlib import Path as _Path

# In a source checkout the Triton kernels lie beside this folder, not inside it: let the package find
# them there when the checkout itself is on sys.path.
_here = _Path(__file__).resolve().parent
if not (_here / "triton_kernels").exists() and (_here.parent / "triton_kernels").exists():
    __path__.append(str(_here.parent))

from kd_kernels.alignment import AlignedSide, Alignment, align_tokens, answer_rows, byte_groups  # noqa: E402
from kd_kernels.backends import BackendUnavailable  # noqa: E402
from kd_kernels.cache import CacheError, CacheWriter, TeacherCache, TeacherRecord  # noqa: E402
from kd_kernels.calibration import Calibration, calibration  # noqa: E402
from kd_kernels.distill import DistillationLoss, Parts, distill, next_token_labels  # noqa: E402
from kd_kernels.drivers.workspace import release_workspace  # noqa: E402
from kd_kernels.hybrid_uld import HybridParts, hybrid_uld, match_vocabularies  # noqa: E402
from kd_kernels.logprobs import linear_logprobs  # noqa: E402
from kd_kernels.models import last_hidden_state  # noqa: E402
from kd_kernels.multi_level import MultiLevelParts, multi_level_transport  # noqa: E402
from kd_kernels.objectives import (  # noqa: E402
    CATALOGUE,
    ForwardKL,
    JensenShannon,
    Objective,
    ReverseKL,
    SinkhornBatch,
    SkewKL,
    SkewReverseKL,
    SortedWasserstein,
    TotalVariation,
    WeightedKL,
)
from kd_kernels.relational import relational_angle, relational_distance  # noqa: E402
from kd_kernels.score import ModelScore, PairScore, Scores, score  # noqa: E402
from kd_kernels.sinkhorn import Transport, sinkhorn, sinkhorn_divergence  # noqa: E402
from kd_kernels.sources import Head, Logits, SparseTarget  # noqa: E402
from kd_kernels.topk import Ranks, TopK, linear_rank, linear_topk  # noqa: E402
from kd_kernels.transport import (  # noqa: E402
    TransportParts,
    class_transport,
    feature_transport,
    sequence_transport,
)
from kd_kernels.version import __version__  # noqa: E402

__all__ = [
    "CATALOGUE",
    "AlignedSide",
    "Alignment",
    "BackendUnavailable",
    "CacheError",
    "CacheWriter",
    "Calibration",
    "DistillationLoss",
    "ForwardKL",
    "Head",
    "HybridParts",
    "JensenShannon",
    "Logits",
    "ModelScore",
    "MultiLevelParts",
    "Objective",
    "PairScore",
    "Parts",
    "Ranks",
    "ReverseKL",
    "Scores",
    "SinkhornBatch",
    "SkewKL",
    "SkewReverseKL",
    "SortedWasserstein",
    "SparseTarget",
    "TeacherCache",
    "TeacherRecord",
    "TopK",
    "TotalVariation",
    "Transport",
    "TransportParts",
    "WeightedKL",
    "__version__",
    "align_tokens",
    "answer_rows",
    "byte_groups",
    "calibration",
    "class_transport",
    "distill",
    "feature_transport",
    "hybrid_uld",
    "last_hidden_state",
    "linear_logprobs",
    "linear_rank",
    "linear_topk",
    "match_vocabularies",
    "multi_level_transport",
    "next_token_labels",
    "relational_angle",
    "relational_distance",
    "release_workspace",
    "score",
    "sequence_transport",
    "sinkhorn",
    "sinkhorn_divergence",
]
