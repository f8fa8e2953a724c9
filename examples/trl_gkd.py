"""TRL's GKD, on-policy: the student generates, the loss comes from hidden states.

    python examples/trl_gkd.py [--tiny]

``HeadGKDTrainer`` is TRL's ``GKDTrainer`` with ``compute_loss`` overridden and nothing else. Generation,
masking and the denominator stay TRL's.
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from toy_loops import END, FULL, PAD, TINY, Record, Size, arguments, batches, compare, models
from transformers import PreTrainedTokenizerFast, set_seed

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
try:
    from trl.experimental.gkd import GKDConfig, GKDTrainer
except ImportError:  # where it was before
    from trl import GKDConfig, GKDTrainer

import kd_kernels as kd

NEW_TOKENS = 16


class HeadGKDTrainer(GKDTrainer):
    """GKD whose loss never holds ``[tokens, vocab]`` logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:  # an evaluation that asks for logits
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        student, teacher = (self.accelerator.unwrap_model(m) for m in (model, self.teacher_model))
        teacher.eval()
        with self.accelerator.autocast():  # bf16=True reaches the models' own forward only
            with torch.no_grad():
                teacher_hidden = kd.last_hidden_state(teacher, **tokens)
            student_hidden = kd.last_hidden_state(student, **tokens)
            return kd.distill(
                kd.Head.from_model(student, student_hidden),
                kd.Head.from_model(teacher, teacher_hidden),
                kd.JensenShannon(self.beta),
                labels=kd.next_token_labels(inputs["labels"]),
                num_items=num_items_in_batch,
            )


class Recorded:
    """Mixed into a trainer: notes each step's loss, the gradients and how much was generated."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.record(loss, model)
        self.generated += int((inputs["labels"] != -100).sum())  # the step has put its own completions here
        return loss


class RecordedDense(Recorded, GKDTrainer):
    pass


class RecordedHead(Recorded, HeadGKDTrainer):
    pass


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "</s>": END, **{f"w{i}": i for i in range(END + 1, vocab)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=512,
    )


def prompts(size: Size, steps: int, seed: int) -> Dataset:
    """Tokenised examples as TRL's collator takes them: prompt and completion, told apart by a mask."""
    rows = []
    for batch in batches(size, steps, seed):
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
            count = int(mask.sum())
            rows.append(
                {
                    "prompt": "",  # only asked for when input_ids are missing
                    "input_ids": ids[:count].tolist(),
                    "completion_mask": (labels[:count] != -100).long().tolist(),
                }
            )
    return Dataset.from_list(rows)


def make_trainer(kind: type[GKDTrainer], size: Size, steps: int, seed: int, folder: str) -> GKDTrainer:
    student, teacher = models(size, seed)
    options = GKDConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size.batch,
        max_steps=steps,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        lmbda=1.0,  # every batch is the student's own
        beta=0.5,
        temperature=0.9,  # of the sampling
        max_new_tokens=NEW_TOKENS,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = kind(
        student,
        teacher,
        options,
        train_dataset=prompts(size, steps, seed),
        processing_class=tokenizer(size.vocab),
    )
    trainer.record, trainer.generated = Record(), 0
    return trainer


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__).parse_args(argv)
    size = TINY if args.tiny else FULL
    generated = {}
    with tempfile.TemporaryDirectory() as folder:

        def prepare(name: str, steps: int):
            kind = RecordedDense if name == "dense" else RecordedHead
            trainer = make_trainer(kind, size, steps, args.seed, folder)

            def run() -> Record:
                set_seed(args.seed)  # both sample the same completions
                trainer.train()
                generated[name] = trainer.generated
                return trainer.record

            return run

        code = compare(prepare, size.steps)
    print(f"tokens the student generated and was trained on: {generated['dense']} and {generated['kd']}")
    return code


if __name__ == "__main__":
    sys.exit(main())
