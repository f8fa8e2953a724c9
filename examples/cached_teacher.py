"""Cache a teacher over a text file, then train a student from the cache alone.

    python examples/cached_teacher.py [TEXT] [--out DIR] [--tiny]

Tokens are bytes. Start it again after a kill: the cache goes on where it stood.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from tiny_lm import TinyLM
from torch import Tensor
from torch.utils.data import DataLoader

import kd_kernels as kd
from kd_kernels.cache.dataset import PadTogether, ResumableSampler, TeacherDataset

VOCAB, K, TEMPERATURE = 256, 32, 2.0


def windows(text: bytes, length: int) -> list[dict]:
    """The text cut into sequences with an id each."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return [{"sequence_id": f"window {i}", "input_ids": w} for i, w in enumerate(tokens.split(length))]


def head_of(model: TinyLM, tokens: Tensor) -> kd.Head:
    return kd.Head(model(tokens), model.head.weight, model.head.bias)


def learn_text(model: TinyLM, data: list[dict], steps: int) -> None:
    """A teacher that knows something: next-byte prediction. In earnest: from_pretrained."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        tokens = data[step % (len(data) - 1)]["input_ids"][None]
        logits = model.head(model(tokens))[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def save_teacher(teacher: TinyLM, data: list[dict], path: Path) -> int:
    """Write what is not there yet; how many sequences that was."""
    options = {"model": "tiny", "vocab_size": VOCAB, "k": K, "temperature": TEMPERATURE, "dtype": "float16"}
    done = 0
    with kd.TeacherCache.create(path, **options, total=len(data)) as writer:
        for item in data:
            if item["sequence_id"] in writer:
                continue
            head = head_of(teacher, item["input_ids"][None])
            saved = kd.linear_topk(head, K, temperature=TEMPERATURE)
            writer.append_batch([item["sequence_id"]], saved, [len(item["input_ids"])])
            done += 1
    return done


def train(student: TinyLM, data: list[dict], path: Path, epochs: int) -> list[float]:
    """Mean loss of each epoch; the teacher is not there."""
    joined = TeacherDataset(data, path)
    sampler = ResumableSampler(len(joined), seed=0)
    loader = DataLoader(joined, batch_size=4, sampler=sampler, collate_fn=PadTogether())
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    means = []
    for epoch in range(epochs):
        sampler.set_position(epoch)
        losses = []
        for batch in loader:
            loss = kd.distill(
                head_of(student, batch["input_ids"]),
                batch["teacher"].target(),
                kd.ForwardKL(),
                temperature=TEMPERATURE,
                labels=kd.next_token_labels(batch["labels"]),
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        print(f"epoch {epoch}: KL from the cached teacher {means[-1]:.4f}")
    return means


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", type=Path, default=Path(__file__), help="default: this script")
    parser.add_argument("--out", type=Path, help="where the cache goes (default: a temporary folder)")
    parser.add_argument("--tiny", action="store_true", help="seconds, for a test")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    length, width, steps, epochs = (64, 32, 40, 4) if options.tiny else (256, 128, 600, 10)
    data = windows(options.text.read_bytes(), length)
    teacher = TinyLM(VOCAB, width, 2, 4, length)
    learn_text(teacher, data, steps)
    student = TinyLM(VOCAB, width // 2, 1, 2, length)
    with tempfile.TemporaryDirectory() as scratch:
        path = options.out or Path(scratch) / "cache"
        done = save_teacher(teacher, data, path)
        cache = kd.TeacherCache.open(path)
        print(f"cached {done} sequences; {len(cache)} with {cache.tokens} tokens are at {path}")
        means = train(student, data, path, epochs)
    return 0 if means[-1] < 0.7 * means[0] else 1


if __name__ == "__main__":
    sys.exit(main())
