"""Liger's Triton modules on CPU, through Triton's interpreter, beside compat.liger; float32.

A program of its own (run by test_compat_liger.py): TRITON_INTERPRET counts when triton is imported. Prints
one line for each case and exits with 1 where loss or gradients differ.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import liger_kernel.ops.kl_div  # noqa: E402
import liger_kernel.ops.tvd  # noqa: E402
import torch  # noqa: E402
from cases import Batch, error  # noqa: E402
from compat_check import evaluate, leaves  # noqa: E402
from liger_kernel import transformers as theirs  # noqa: E402

from kd_kernels.compat import liger as ours  # noqa: E402

BAR = 1e-5


class Scalar(float):
    """A float argument as compiled kernels see it; the interpreter hands them a bare one."""

    def to(self, _):
        return self


class WithScalars:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            def convert(x):
                return Scalar(x) if type(x) is float else x

            options = {name: convert(value) for name, value in options.items()}
            return self.kernel[grid](*map(convert, args), **options)

        return launch


for module, kernel in (
    (liger_kernel.ops.kl_div, "_kldiv_kernel_forward"),
    (liger_kernel.ops.tvd, "_tv_distance_kernel"),
):
    setattr(module, kernel, WithScalars(getattr(module, kernel)))

batch = Batch(lead=(7,), vocab=37, student_width=8, teacher_width=10)
heads = [batch.tensors[f"{side} {part}"] for side in ("student", "teacher") for part in ("hidden", "weight")]
logits = [batch.tensors[f"{side} logits"] for side in ("student", "teacher")]
soft = logits[1].softmax(-1)
soft[:, ::5] = 0  # rows of any mass, with zeros


BETAS, REDUCTIONS = (0.0, 0.3, 1.0), ("batchmean", "mean", "sum")


def kl_div(module, labels, student, teacher):  # takes no labels
    target = teacher.log_softmax(-1) if module.log_target else 0.8 * teacher.softmax(-1)
    return module(student.log_softmax(-1), target)


# module: (options to try, tensors, call of the module)
MODULES = {
    "LigerFusedLinearJSD": (
        [{"jsd_beta": beta, "temperature": 1.7} for beta in BETAS],
        heads,
        lambda module, labels, *x: module(*x, labels),
    ),
    "LigerFusedLinearKLDivLoss": (
        [{"reduction": reduction, "temperature": 1.7} for reduction in REDUCTIONS],
        [*heads[:2], soft],
        lambda module, labels, *x: module(*x, labels),
    ),
    "LigerJSD": (
        [{"beta": beta} for beta in BETAS],
        logits,
        lambda module, labels, s, t: module(s.log_softmax(-1), t.log_softmax(-1), labels),
    ),
    "LigerTVDLoss": (
        [{"reduction": reduction} for reduction in REDUCTIONS],
        logits,
        lambda module, labels, s, t: module(s.softmax(-1), t.softmax(-1), labels),
    ),
    "LigerKLDIVLoss": (
        [{"reduction": reduction, "log_target": log} for reduction in REDUCTIONS for log in (False, True)],
        logits,
        kl_div,
    ),
}


def same(name, options, tensors, call, labels):
    def results(library):
        module = getattr(library, name)(**options)
        return evaluate(lambda *x: call(module, labels, *x), leaves(tensors, torch.float32))

    pairs = list(zip(results(ours), results(theirs)))
    if any((x is None) != (y is None) or y is not None and y.abs().sum() == 0 for x, y in pairs):
        return False
    return all(y is None or error(x, y) < BAR for x, y in pairs)


if __name__ == "__main__":
    failed = False
    for name, (variants, tensors, call) in MODULES.items():
        for options in variants:
            for labels in (batch.labels, None):
                good = same(name, options, tensors, call, labels)
                failed |= not good
                print(f"{'same' if good else 'DIFFERENT'}: {name} {options}, labels: {labels is not None}")
    sys.exit(failed)
