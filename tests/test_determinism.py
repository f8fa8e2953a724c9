"""The same call gives the same bits in the next process too; with any number of threads in one process:
test_autograd.py, test_sinkhorn.py and others."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_kernels import triton_kernels

KERNELS = sorted(path for path in Path(triton_kernels.__path__[0]).glob("*.py") if path.stem != "__init__")


def names_of(module: ast.Module) -> set[str]:
    """All that it imports or looks up."""
    found = {node.attr for node in ast.walk(module) if isinstance(node, ast.Attribute)}
    found |= {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
    return found | {node.name.rpartition(".")[2] for node in ast.walk(module) if isinstance(node, ast.alias)}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_triton_kernels_neither_race_nor_tune_themselves(path):
    """Atomics add up in the order in which programs arrive; a configuration that is tuned on the spot is
    another on another day. Both change the last bits of a result from run to run."""
    names = names_of(ast.parse(path.read_text()))
    assert "jit" in names
    assert not {name for name in names if name.startswith("atomic_") or name in ("autotune", "heuristics")}


# Of each call a digest of its results and gradients. Arguments: how many threads, and what the models are.
SCRIPT = """
import hashlib, sys, torch, kd_kernels as kd
threads, heads = int(sys.argv[1]), sys.argv[2] == "heads"
torch.set_num_threads(threads)
torch.manual_seed(0)
n, vocab = 67, 1031
mixed = [torch.randn(n, vocab).bfloat16() * 3, torch.randn(n, vocab) * 3]
ids = torch.randint(vocab, (n, 9))
labels, logprobs = ids[:, 0], torch.randn(n, 12).log_softmax(1)[:, :9]

def model(i):
    if not heads:
        return kd.Logits(mixed[i].clone().requires_grad_())
    dtype = mixed[i].dtype
    return kd.Head(*(torch.randn(k, 24).to(dtype).requires_grad_() for k in (n, vocab)))

def show(name, results, *leaves):
    if leaves:
        torch.stack([x.double().sum() for x in results]).sum().backward()
    digest = hashlib.sha256()
    for x in (*results, *(x.grad for x in leaves)):
        digest.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    print(name, digest.hexdigest()[:16])

def leaves(*models):
    return [x for m in models for x in m.tensors() if x is not None]

objectives = [kd.ForwardKL(), kd.JensenShannon(), kd.SortedWasserstein(), kd.SortedWasserstein(top_k=40),
              kd.SinkhornBatch(iterations=20)]
for objective in objectives:
    s, t = model(0), model(1)
    loss = kd.distill(s, t, objective, labels=labels, hard_weight=0.5, teacher_grad=True, temperature=1.3,
                      workspace_bytes=1 << 18)
    show(objective, [loss], *leaves(s, t))
s = model(0)
target = kd.SparseTarget(ids, logprobs)
show("sparse", [kd.distill(s, target, kd.ReverseKL(), labels=labels, hard_weight=0.5)], *leaves(s))
s = model(1)
show("logprobs", kd.linear_logprobs(s, ids, entropy=True), *leaves(s))
top = kd.linear_topk(model(0), 20, targets=labels, samples=7, seed=5)
show("topk", [x for x in top if isinstance(x, torch.Tensor)])
scores = kd.score(model(0), model(1), labels=labels)
show("score", [x for of in (*scores.models, *scores.pairs) for x in of])
x, y = torch.randn(40, 24).requires_grad_(), torch.randn(40, 24)
if heads:  # their Gram matrices are products, too
    show("angle", [kd.relational_angle(x, y)], x)
    x = x.detach().requires_grad_()
    show("distance", [kd.relational_distance(x, y)], x)
cost = torch.rand(5, 40, 60).requires_grad_()
show("sinkhorn", [kd.sinkhorn(cost, epsilon=0.1, iterations=50).transport_cost], cost)
"""


def digests(threads: int, models: str, seed: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", SCRIPT, str(threads), models]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len({line.split()[-1] for line in lines}) == (12 if models == "heads" else 10)
    return lines


def test_existing_logits_in_another_process_with_more_threads():
    """Every row is one thread's, whichever it is."""
    assert digests(1, "logits", "1") == digests(2, "logits", "2")


def test_heads_in_another_process():
    """With as many threads: a product's order of summation is its library's affair."""
    assert digests(2, "heads", "1") == digests(2, "heads", "2")
