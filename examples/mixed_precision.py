"""bfloat16 autocast with gradient accumulation and activation checkpointing.

    python examples/mixed_precision.py [--tiny]

The batch of one optimizer step may be cut in any way: with ``num_items``, the tokens that count in all
of it, loss and gradients are those of the uncut batch. Without it each piece is divided by its own
tokens, and the step depends on the cut.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from toy_loops import (
    FULL,
    TINY,
    Batch,
    Record,
    arguments,
    batches,
    compare,
    gradient_error,
    loss_error,
    models,
)
from transformers import PreTrainedModel

import kd_kernels as kd

# A gradient that was rounded to bfloat16 in pieces, and one that was rounded once.
BAR = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def cut(batch: Batch, sizes: list[int]) -> list[Batch]:
    """The batch as micro-batches of ``sizes`` sequences."""
    pieces = {name: values.split(sizes) for name, values in batch.items()}
    return [{name: pieces[name][i] for name in pieces} for i in range(len(sizes))]


def dense_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, num_items: int) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    counts = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        log_p = teacher(ids, attention_mask=mask).logits[:, :-1][counts].float().log_softmax(-1)
    logits = checkpoint(lambda: student(ids, attention_mask=mask).logits, use_reentrant=False)
    log_q = logits[:, :-1][counts].float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / num_items


def head_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, num_items: int | None
) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        teacher_hidden = teacher.model(ids, attention_mask=mask).last_hidden_state
    hidden = checkpoint(
        lambda: student.model(ids, attention_mask=mask).last_hidden_state, use_reentrant=False
    )
    return kd.distill(
        kd.Head(hidden, student.get_output_embeddings().weight),  # float32 master weights: cast inside
        kd.Head(teacher_hidden, teacher.get_output_embeddings().weight),
        kd.ForwardKL(),
        labels=kd.next_token_labels(batch["labels"]),
        num_items=num_items,
    )


def optimizer_step(
    loss_of, student: PreTrainedModel, teacher: PreTrainedModel, pieces: list[Batch], dtype, num_items
) -> Record:
    """Accumulate the gradients of all pieces; the record holds the summed loss."""
    total = torch.zeros(())
    for piece in pieces:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of(student, teacher, piece, num_items)
        loss.backward()
        total += loss.detach()
    record = Record()
    record(total, student)
    student.zero_grad()
    return record


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    size = TINY if args.tiny else FULL
    (batch,) = batches(size, 1, args.seed)
    num_items = int((batch["labels"][:, 1:] != -100).sum())
    whole, half = [size.batch], size.batch // 2

    def prepare(name: str, steps: int):
        student, teacher = models(size, args.seed)
        loss_of = dense_loss if name == "dense" else head_loss
        pieces = cut(batch, [half, half])
        return lambda: optimizer_step(loss_of, student, teacher, pieces, torch.bfloat16, num_items)

    # The dense path rounds its logits to bfloat16, the head path does not: equal to a few roundings.
    code = compare(prepare, 1, loss_tolerance=1e-2, gradient_tolerance=5e-2)

    student, teacher = models(size, args.seed)
    cuts = [[half, half], [1] * size.batch, [1, size.batch - 1]]
    print("\nthe same step, cut:          loss apart  gradients apart")
    for dtype, bar in BAR.items():
        uncut = optimizer_step(head_loss, student, teacher, cut(batch, whole), dtype, num_items)
        for sizes in cuts:
            record = optimizer_step(head_loss, student, teacher, cut(batch, sizes), dtype, num_items)
            apart = loss_error(record, uncut), gradient_error(record, uncut)
            label = f"{str(dtype)[6:]} in {len(sizes)} pieces"
            print(f"{label:28s} {apart[0]:10.1e} {apart[1]:16.1e}")
            if apart[0] > bar / 10 or apart[1] > bar:
                print(f"NOT EQUAL: the bars are {bar / 10:.0e} and {bar:.0e}")
                code = 1
        # what would happen without num_items: each piece a mean of its own, averaged over the pieces
        naive = optimizer_step(head_loss, student, teacher, cut(batch, cuts[1]), dtype, None)
        naive.losses = [naive.losses[0] / size.batch]
        naive.gradients = {name: g / size.batch for name, g in naive.gradients.items()}
        apart = loss_error(naive, uncut), gradient_error(naive, uncut)
        print(f"{str(dtype)[6:] + ', mean of means':28s} {apart[0]:10.1e} {apart[1]:16.1e}")
        if apart[1] < bar:
            print("NOT SHOWN: the cut should have mattered without num_items; try another --seed")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
