"""The distances of relational distillation as a torch op."""

from kd_kernels.drivers.distance import walk_distances
from kd_kernels.drivers.points import walk_rows
from kd_kernels.ops.checks import check_positive
from kd_kernels.ops.points import between_points


@between_points("distance", "Tensor beta, Tensor eps", "relational_distance")
def distance(student, teacher, mask, beta, eps, backend, needs):
    """The mean of smooth L1 terms over all relative distances between N points, and its gradients."""
    check_positive("beta", beta)

    def walk(*squared):
        return walk_distances(*squared, beta.item(), eps.item(), backend, needs)

    return walk_rows(walk, (student, teacher), mask, needs, power=2)
