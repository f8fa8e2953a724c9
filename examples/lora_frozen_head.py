"""A LoRA student with a frozen head: three products instead of four, and no head gradient allocated.

    python examples/lora_frozen_head.py [--tiny]

Nothing has to be said: the head's weight does not require a gradient, so none is computed. The example
counts the matrix products with the vocabulary in them, against the same student with a head that
trains. LoRA must stay below the head: an adapter on the head is not in its ``weight``.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from toy_loops import FULL, TINY, Batch, Record, Size, arguments, batches, compare, measured, models
from transformers import PreTrainedModel

import kd_kernels as kd

PRODUCTS = {"aten::mm", "aten::addmm"}


def lora_student(size: Size, seed: int, head_trains: bool = False) -> tuple[PeftModel, PreTrainedModel]:
    """(student with LoRA on its attention, teacher)."""
    base, teacher = models(size, seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    student = get_peft_model(base, config)
    student.get_base_model().get_output_embeddings().weight.requires_grad_(head_trains)
    return student, teacher


def dense_loss(student: PeftModel, teacher: PreTrainedModel, batch: Batch) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    counts = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        log_p = teacher(**inputs).logits[:, :-1][counts].log_softmax(-1)
    log_q = student(**inputs).logits[:, :-1][counts].log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def head_loss(student: PeftModel, teacher: PreTrainedModel, batch: Batch) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    base = student.get_base_model()  # the adapters are inside its layers
    with torch.no_grad():
        teacher_hidden = teacher.model(**inputs).last_hidden_state
    return kd.distill(
        kd.Head(base.model(**inputs).last_hidden_state, base.get_output_embeddings().weight),
        kd.Head(teacher_hidden, teacher.get_output_embeddings().weight),
        kd.ReverseKL(),
        labels=kd.next_token_labels(batch["labels"]),
    )


def cost_of_head(size: Size, seed: int, head_trains: bool) -> tuple[int, float, bool]:
    """(products with the vocabulary in them, peak MiB, whether the head has a gradient) of one step."""
    student, teacher = lora_student(size, seed, head_trains)
    (batch,) = batches(size, 1, seed)

    def step() -> Record:
        head_loss(student, teacher, batch).backward()
        return Record()

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        step()
    products = sum(
        event.name in PRODUCTS and any(size.vocab in shape for shape in event.input_shapes)
        for event in profile.events()
    )
    weight = student.get_base_model().get_output_embeddings().weight
    has_gradient = weight.grad is not None
    weight.grad = None
    return products, measured(step).peak_mib, has_gradient


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    size = TINY if args.tiny else FULL

    def prepare(name: str, steps: int):
        student, teacher = lora_student(size, args.seed)
        data, record = batches(size, steps, args.seed), Record()
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        loss_of = dense_loss if name == "dense" else head_loss

        def run() -> Record:
            for batch in data:
                loss = loss_of(student, teacher, batch)
                loss.backward()
                record(loss, student)
                optimizer.step()
                optimizer.zero_grad()
            return record

        return run

    code = compare(prepare, size.steps)
    frozen, trains = (cost_of_head(size, args.seed, head_trains) for head_trains in (False, True))
    print(
        f"head frozen: {frozen[0]} products, {frozen[1]:.1f} MiB; trained: {trains[0]}, {trains[1]:.1f} MiB"
    )
    as_promised = frozen[::2] == (3, False) and trains[::2] == (4, True)
    if not as_promised:
        print("NOT AS PROMISED: a frozen head should take 3 products and get no gradient, a trained one 4")
    return code or (0 if as_promised else 1)


if __name__ == "__main__":
    sys.exit(main())
