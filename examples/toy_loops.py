"""What the loop examples share: toy models and data, a record of a run, and the comparison they print.

Models are small random Llamas: nothing is downloaded. Each example runs one training step twice, by the
trainer's own dense path and by the head path, from the same weights on the same batches.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from demo_measure import forget_peak, resident_bytes
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kd_kernels as kd

PAD, END = 0, 1  # token ids
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
Batch = dict[str, Tensor]  # input_ids, attention_mask, labels; each [batch, length]


@dataclass(frozen=True)
class Size:
    vocab: int
    batch: int  # sequences
    length: int  # tokens of each
    student_width: int
    teacher_width: int
    steps: int


FULL = Size(vocab=16_384, batch=8, length=128, student_width=128, teacher_width=192, steps=4)
TINY = Size(vocab=8_192, batch=4, length=96, student_width=32, teacher_width=48, steps=2)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the size that the tests run")
    parser.add_argument("--seed", type=int, default=0, help="of the models and the data")
    return parser


def causal_lm(vocab: int, width: int, seed: int) -> LlamaForCausalLM:
    """A random Llama of two layers whose logits have a standard deviation of about 2.5, as trained ones."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=2.5 * width**-0.5,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


def models(size: Size, seed: int) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """(student, teacher); the same weights for the same seed."""
    student = causal_lm(size.vocab, size.student_width, 2 * seed)
    return student.train(), causal_lm(size.vocab, size.teacher_width, 2 * seed + 1).eval()


def batches(size: Size, count: int, seed: int) -> list[Batch]:
    """Random sequences of different lengths; prompts and padding have the label -100."""
    g = torch.Generator().manual_seed(seed)
    position = torch.arange(size.length)
    made = []
    for _ in range(count):
        ids = torch.randint(END + 1, size.vocab, (size.batch, size.length), generator=g)
        length = torch.randint(size.length // 3, size.length + 1, (size.batch, 1), generator=g)
        prompt = torch.randint(2, size.length // 4, (size.batch, 1), generator=g)
        real = position < length
        made.append(
            {
                "input_ids": torch.where(real, ids, PAD),
                "attention_mask": real.long(),
                "labels": torch.where(real & (position >= prompt), ids, -100),
            }
        )
    return made


@dataclass
class Record:
    """Losses of a run, step by step, and the gradients as they stood after ``accumulation`` of them."""

    accumulation: int = 1
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    peak_mib: float = 0.0

    def __call__(self, loss: Tensor, model: torch.nn.Module) -> None:
        self.losses.append(float(loss.detach()))
        if len(self.losses) == self.accumulation:
            self.gradients = {
                name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
            }


def measured(run: Callable[[], Record]) -> Record:
    """Run, and note the peak memory above what the process held before, the package's workspace included."""
    kd.release_workspace()
    gc.collect()
    try:
        libc = ctypes.CDLL("libc.so.6")
        # Freed pages that glibc keeps would hide some of the peak, or count twice in fragments: tensors
        # of 64 KiB and more go back to the system at once.
        libc.mallopt(_MMAP_THRESHOLD, 64 << 10)
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        pass
    forget_peak()
    before = resident_bytes("VmRSS")
    record = run()
    record.peak_mib = (resident_bytes("VmHWM") - before) / 2**20
    return record


def loss_error(record: Record, other: Record) -> float:
    """The largest relative difference of any step's loss."""
    assert len(record.losses) == len(other.losses) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(record.losses, other.losses))


def gradient_error(record: Record, other: Record) -> float:
    """The largest ``|a - b| / |b|`` of any parameter's gradient.

    A parameter whose gradient is next to nothing is held to a thousandth of the whole gradient's norm.
    """
    assert record.gradients.keys() == other.gradients.keys() and record.gradients
    whole = torch.stack([g.norm() for g in other.gradients.values()]).norm()
    return max(
        float((record.gradients[name] - g).norm() / g.norm().clamp(min=1e-3 * whole))
        for name, g in other.gradients.items()
    )


def compare(
    prepare: Callable[[str, int], Callable[[], Record]],
    steps: int,
    *,
    loss_tolerance: float = 1e-5,
    gradient_tolerance: float = 1e-4,
) -> int:
    """Run ``prepare("dense", steps)`` and ``prepare("kd", steps)``, print both, return an exit code.

    ``prepare`` makes models and data, which are not measured, and returns the run, which is.
    """
    records = {}
    for name in ("dense", "kd"):
        prepare(name, 1)()  # libraries load and make their pools
        records[name] = measured(prepare(name, steps))
    dense, ours = records["dense"], records["kd"]
    apart, bent = loss_error(ours, dense), gradient_error(ours, dense)
    norm = {name: torch.stack([g.norm() for g in r.gradients.values()]).norm() for name, r in records.items()}
    print(f"{'':22s} {'dense':>12s} {'kd.distill':>12s}")
    for step, (a, b) in enumerate(zip(dense.losses, ours.losses)):
        print(f"{f'loss of step {step}':22s} {a:12.6f} {b:12.6f}")
    print(f"{'gradient norm':22s} {norm['dense']:12.6f} {norm['kd']:12.6f}")
    print(f"{'peak above inputs, MiB':22s} {dense.peak_mib:12.1f} {ours.peak_mib:12.1f}")
    print(f"losses at most {apart:.1e} apart, gradients of a parameter at most {bent:.1e} (relative)")
    equal = apart <= loss_tolerance and bent <= gradient_tolerance
    if not equal:
        print(f"NOT EQUAL: the bars are {loss_tolerance:.0e} and {gradient_tolerance:.0e}")
    return 0 if equal else 1
