"""The same loss three ways: ours, plain torch in the same dtype, and float64; and their comparison."""

from __future__ import annotations

import torch
from cases import FLOOR, Batch, error, leaves
from torch import Tensor

import kd_kernels as kd
from kd_kernels.reference.dense import dense_distill

Source = kd.Head | kd.Logits | kd.SparseTarget


def widened(source: Source, dtype: torch.dtype, device: torch.device | str | None = None) -> Source:
    """The same rounded numbers in ``dtype``, as fresh leaves; on ``device`` if one is named."""
    if isinstance(source, kd.SparseTarget):  # a constant, in float32 or float64 whatever the student is
        tail = source.log_tail_mass
        wide = torch.promote_types(dtype, torch.float32)
        return kd.SparseTarget(
            source.ids.to(device),
            source.logprobs.to(device, wide),
            source.missing,
            source.temperature,
            None if tail is None else tail.to(device, wide),
        )
    wide = [
        None if x is None else x.detach().to(device, dtype).requires_grad_(x.requires_grad)
        for x in source.tensors()
    ]
    if isinstance(source, kd.Head):
        return kd.Head(*wide, scale=source.scale, softcap=source.softcap)
    return kd.Logits(wide[0], scale=source.scale, softcap=source.softcap)


def copy(source: Source) -> Source:
    return widened(source, source.tensors()[0].dtype)


def plain(student: Source, teacher: Source, objective: kd.Objective, **options) -> Tensor:
    """What a careful user writes: logits from a matrix product in the inputs' dtype, then float32."""

    def logits(source: Source) -> Source:
        if isinstance(source, kd.SparseTarget):
            return source
        if isinstance(source, kd.Head):
            z = torch.nn.functional.linear(source.hidden, source.weight, source.bias)
        else:
            z = source.values
        wide = torch.promote_types(z.dtype, torch.float32)
        return kd.Logits(z.to(wide), scale=source.scale, softcap=source.softcap)

    return dense_distill(logits(student), logits(teacher), objective, **options)


def gradients(loss: Tensor, sources: list[Source], upstream: Tensor | None = None) -> list[Tensor | None]:
    wanted = [x for x in leaves(*sources) if x.requires_grad]
    upstream = None if upstream is None or loss.dim() == 0 else upstream.to(loss.dtype).reshape(loss.shape)
    return list(torch.autograd.grad(loss, wanted, upstream, allow_unused=True))


def values_and_gradients(
    objective: kd.Objective, student: Tensor, teacher: Tensor, backend: str | None, **options
) -> tuple[Tensor, ...]:
    """Per-row losses and both gradients for logits."""
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = kd.distill(
        student, teacher, objective, reduction="none", teacher_grad=True, backend=backend, **options
    )
    return loss.detach(), *torch.autograd.grad(loss.sum(), (student, teacher))


def compare(
    batch: Batch,
    student: Source,
    teacher: Source,
    objective: kd.Objective,
    backend: str | None,
    device: torch.device | str | None = None,
    **options,
) -> None:
    """Assert the numerics contract for loss and every gradient: at most twice plain torch's error. On
    ``device``, if one is named, is ours alone."""
    dtype = student.tensors()[0].dtype
    own = {k: options.pop(k) for k in ("logits_dtype", "workspace_bytes", "compact") if k in options}
    teacher_grad = any(x.requires_grad for x in leaves(teacher))
    ours = [widened(x, x.tensors()[0].dtype, device) for x in (student, teacher)]
    moved = {k: v.to(device) if isinstance(v, Tensor) and v.dim() else v for k, v in options.items()}
    theirs = (copy(student), copy(teacher))
    exact = (widened(student, torch.float64), widened(teacher, torch.float64))
    results = []
    for sources, call in (
        (
            ours,
            lambda s, t, o: kd.distill(s, t, o, teacher_grad=teacher_grad, backend=backend, **own, **moved),
        ),
        (theirs, lambda s, t, o: plain(s, t, o, **options)),
        (exact, lambda s, t, o: dense_distill(s, t, o, **options)),
    ):
        loss = call(*sources, objective)
        found = [loss, *gradients(loss, list(sources), batch.upstream.to(loss.device))]
        results.append([x.to(student.tensors()[0].device) for x in found])
    assert results[0][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Triton's interpreter cuts a bfloat16 off where a GPU rounds it: up to twice the error, all one way.
    cut = backend == "triton" and dtype == torch.bfloat16 and not ours[0].tensors()[0].is_cuda
    floor = FLOOR[dtype] * (2 if cut else 1)
    names = ["loss", *(f"gradient {i}" for i in range(len(results[0]) - 1))]
    for name, x, y, z in zip(names, *results):
        bar = 2 * error(y, z) + floor
        assert error(x, z) <= bar, f"{name}: error {error(x, z):.2e}, bar {bar:.2e}, plain {error(y, z):.2e}"
        assert z.abs().sum() > 0, f"{name}: the test is vacuous"
