"""Real text that every Python has: its own standard library and language reference, as tokens."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_progress import progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|end|>"  # stands between documents
# Tests and generated tables are long and say little; third-party packages differ from machine to machine.
SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Corpus:
    """Token streams of documents that are trained on and of documents that never are."""

    train: Tensor
    held_out: Tensor
    vocab: int
    documents: int
    megabytes: float

    def train_batch(self, generator: torch.Generator, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Random windows of the training stream: tokens and the tokens that follow them."""
        start = torch.randint(self.train.numel() - length - 1, (batch, 1), generator=generator)
        window = self.train[start + torch.arange(length + 1)]
        return window[:, :-1], window[:, 1:]

    def held_out_windows(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """``count`` windows spread evenly over the held-out stream; the same ones on every call."""
        last = self.held_out.numel() - length - 1
        start = torch.linspace(0, last, count).long()[:, None]
        window = self.held_out[start + torch.arange(length + 1)]
        return window[:, :-1], window[:, 1:]


def read_documents() -> list[tuple[str, str]]:
    """(name, text) of the library's source files and of the language reference's topics."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts):
            documents.append((name.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package the documentation apart
        topics = {}
    documents.extend((f"topics/{name}", text) for name, text in sorted(topics.items()))
    return documents


def load_corpus(vocab: int, out: Path) -> Corpus:
    """Read the documents, hold one in twelve out, train a byte-level BPE on the rest and apply it."""
    documents = read_documents()
    if len(documents) < 100:
        raise SystemExit(
            f"only {len(documents)} source files in {sysconfig.get_path('stdlib')}: too little text"
        )
    # A checksum of the name decides, so a document is on the same side in every run.
    is_held_out = [zlib.crc32(name.encode()) % 12 == 0 for name, _ in documents]
    train_texts = [text for (_, text), held in zip(documents, is_held_out) if not held]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bar = progress(train_texts, desc="learning tokens", unit="file")
    tokenizer.train_from_iterator(bar, trainer)
    tokenizer.save(str(out / "tokenizer.json"))

    end = tokenizer.token_to_id(END)
    streams: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for (_, text), held in zip(progress(documents, desc="tokenising", unit="file"), is_held_out):
        streams[held].append(np.array([*tokenizer.encode(text).ids, end]))
    return Corpus(
        train=torch.from_numpy(np.concatenate(streams[False])),
        held_out=torch.from_numpy(np.concatenate(streams[True])),
        vocab=tokenizer.get_vocab_size(),
        documents=len(documents),
        megabytes=sum(len(text) for _, text in documents) / 1e6,
    )
