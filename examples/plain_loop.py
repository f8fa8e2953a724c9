"""A plain torch loop: ten lines changed, nowhere else.

    python examples/plain_loop.py [--tiny]

``train_dense`` is a loop as people have it; ``train`` is the same loop with the loss from hidden states.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from toy_loops import FULL, TINY, Batch, Record, arguments, batches, compare, models
from tqdm import tqdm
from transformers import PreTrainedModel

import kd_kernels as kd


def train_dense(
    student: PreTrainedModel, teacher: PreTrainedModel, data: list[Batch], record: Record
) -> None:
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for batch in tqdm(data, delay=2):
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        with torch.no_grad():
            teacher_logits = teacher(ids, attention_mask=mask).logits[:, :-1]
        student_logits = student(ids, attention_mask=mask).logits[:, :-1]
        counts = labels[:, 1:] != -100
        log_p = F.log_softmax(teacher_logits[counts] / 2.0, dim=-1)
        log_q = F.log_softmax(student_logits[counts] / 2.0, dim=-1)
        loss = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * 2.0**2
        loss.backward()
        record(loss, student)
        optimizer.step()
        optimizer.zero_grad()


def train(student: PreTrainedModel, teacher: PreTrainedModel, data: list[Batch], record: Record) -> None:
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for batch in tqdm(data, delay=2):
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        with torch.no_grad():
            teacher_hidden = teacher.model(ids, attention_mask=mask).last_hidden_state
        student_hidden = student.model(ids, attention_mask=mask).last_hidden_state
        loss = kd.distill(
            kd.Head(student_hidden, student.get_output_embeddings().weight),
            kd.Head(teacher_hidden, teacher.get_output_embeddings().weight),
            kd.ForwardKL(),
            labels=kd.next_token_labels(labels),
            temperature=2.0,
            temperature_squared=True,
        )
        loss.backward()
        record(loss, student)
        optimizer.step()
        optimizer.zero_grad()


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    size = TINY if args.tiny else FULL

    def prepare(name: str, steps: int):
        student, teacher = models(size, args.seed)
        data, record = batches(size, steps, args.seed), Record()

        def run() -> Record:
            (train_dense if name == "dense" else train)(student, teacher, data, record)
            return record

        return run

    return compare(prepare, size.steps)


if __name__ == "__main__":
    sys.exit(main())
