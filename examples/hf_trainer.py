"""A Hugging Face Trainer: override compute_loss, honour num_items_in_batch.

    python examples/hf_trainer.py [--tiny] [--bf16]

The Trainer counts the labels of all batches of an optimizer step and hands the count to
``compute_loss``; as ``num_items`` it makes the step the same however it is cut into batches. This is
for one process: docs/loops.md says what DDP wants.
"""

from __future__ import annotations

import sys
import tempfile

import torch
import torch.nn.functional as F
from toy_loops import FULL, TINY, Record, Size, arguments, batches, compare, models
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

import kd_kernels as kd

ACCUMULATION = 2


class DenseTrainer(Trainer):
    """The usual subclass, with both models' logits."""

    def __init__(self, *args, teacher: PreTrainedModel, record: Record, **options) -> None:
        super().__init__(*args, **options)
        self.teacher, self.record = teacher, record

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher(**inputs).logits[:, :-1].float()
        outputs = model(**inputs)
        counts = labels != -100
        log_p = teacher_logits[counts].log_softmax(-1)
        log_q = outputs.logits[:, :-1][counts].log_softmax(-1)
        loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        loss = loss / (counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.record(loss, model)
        return loss


class HeadTrainer(DenseTrainer):
    """The same from hidden states: only ``compute_loss`` differs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = kd.next_token_labels(inputs.pop("labels"))
        with self.accelerator.autocast():  # bf16=True reaches the model's own forward only
            with torch.no_grad():
                teacher_hidden = kd.last_hidden_state(self.teacher, **inputs)
            hidden = kd.last_hidden_state(model, **inputs)
            loss = kd.distill(
                kd.Head.from_model(model, hidden),
                kd.Head.from_model(self.teacher, teacher_hidden),
                kd.ForwardKL(),
                labels=labels,
                num_items=num_items_in_batch,
            )
        return (loss, {"loss": loss}) if return_outputs else loss


def make_trainer(
    kind: type[DenseTrainer], size: Size, steps: int, seed: int, bf16: bool, folder: str
) -> DenseTrainer:
    """A trainer whose every optimizer step takes one toy batch, in ``ACCUMULATION`` pieces."""
    student, teacher = models(size, seed)
    rows = [
        {name: values[i] for name, values in batch.items()}
        for batch in batches(size, steps, seed)
        for i in range(size.batch)
    ]
    options = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        bf16=bf16,
        per_device_train_batch_size=size.batch // ACCUMULATION,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=steps,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    return kind(
        student,
        options,
        train_dataset=rows,
        data_collator=default_data_collator,
        teacher=teacher,
        record=Record(accumulation=ACCUMULATION),
    )


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, by the Trainer's own switch")
    args = parser.parse_args(argv)
    size = TINY if args.tiny else FULL
    with tempfile.TemporaryDirectory() as folder:

        def prepare(name: str, steps: int):
            kind = DenseTrainer if name == "dense" else HeadTrainer
            trainer = make_trainer(kind, size, steps, args.seed, args.bf16, folder)

            def run() -> Record:
                trainer.train()
                return trainer.record

            return run

        if args.bf16:  # the dense path rounds its logits, and its steps drift apart from ours
            return compare(prepare, 1, loss_tolerance=1e-2, gradient_tolerance=5e-2)
        return compare(prepare, size.steps)


if __name__ == "__main__":
    sys.exit(main())
