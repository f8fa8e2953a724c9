"""The angles of relational distillation as a torch op."""

from kd_kernels.drivers.angle import walk_angles
from kd_kernels.drivers.points import walk_rows
from kd_kernels.ops.checks import check_positive
from kd_kernels.ops.points import between_points


@between_points("angle", "Tensor beta", "relational_angle")
def angle(student, teacher, mask, beta, backend, needs):
    """The mean of smooth L1 terms over all angles between N points, and its gradients."""
    check_positive("beta", beta)

    def walk(*squared):
        return walk_angles(*squared, beta.item(), backend, needs)

    return walk_rows(walk, (student, teacher), mask, needs, power=3)
