"""Small teacher caches, for the tests about them."""

import torch

import kd_kernels as kd

VOCAB, K, SAMPLES = 97, 6, 12
FIELDS = ("ids", "logits", "lse", "log_tail_mass", "sample_ids", "sample_counts")


def teacher(length, seed, temperature=1.0, k=K, samples=SAMPLES, dtype=torch.float32):
    """What kd.linear_topk says of ``length`` tokens. Logits far from 0, as models have them."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(length, VOCAB, generator=generator, dtype=torch.float64) * 4 + 25).to(dtype)
    return kd.linear_topk(logits, k, temperature=temperature, samples=samples, seed=seed, backend="reference")


def create(path, shard_bytes=2000, **options):
    wanted = {"model": "toy", "vocab_size": VOCAB, "k": K, "samples": SAMPLES, **options}
    return kd.TeacherCache.create(path, shard_bytes=shard_bytes, **wanted)


def write(path, records, **options):
    with create(path, **options) as writer:
        for name, record in records.items():
            writer.append(name, record)
    return kd.TeacherCache.open(path)


def records(count, **options):
    return {f"sequence {i}": teacher(3 + i % 5, i, **options) for i in range(count)}


def assert_same(found, written):
    """Bit for bit, NaN included."""
    assert found.temperature == written.temperature
    for name in FIELDS:
        a, b = getattr(found, name), getattr(written, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            a, b = (x.clone(memory_format=torch.contiguous_format) for x in (a, b))
            assert a.numel() == 0 or torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
