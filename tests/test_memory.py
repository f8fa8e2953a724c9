"""Peak memory of a step, in a fresh process: inputs, gradients, the workspace, and little else."""

import pytest
from watch import in_a_process

from kd_kernels import native


def needs_products_of(dtype: str) -> None:
    if "bfloat16" in dtype and not native.processor_flags() & {"avx512_bf16", "amx_bf16"}:
        pytest.skip("no bfloat16 products on this processor: the BLAS widens operands in memory of its own")


_STEP = """
import sys, torch, kd_kernels as kd
dtype, logits_dtype, reduction = (eval(x) for x in sys.argv[1:4])
torch.set_num_threads(2)
tokens, vocab, workspace = 1500, 32000, 48 << 20

def head(n, v, width, grad):
    h, w = torch.randn(n, width).to(dtype), torch.randn(v, width).to(dtype) * width**-0.5
    return kd.Head(h.requires_grad_(grad), w.requires_grad_(grad))

def step(student, teacher):
    loss = kd.distill(student, teacher, kd.JensenShannon(), logits_dtype=logits_dtype, reduction=reduction,
                      workspace_bytes=workspace)
    loss.sum().backward()

step(head(8, 500, 64, True), head(8, 500, 96, False))  # libraries load and make their pools
kd.release_workspace()
student, teacher = head(tokens, vocab, 64, True), head(tokens, vocab, 96, False)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(student, teacher)
above = status("VmHWM") - before
weight = vocab * 64
gradients = weight * 4 + weight * dtype.itemsize + tokens * 64 * dtype.itemsize * 2
print(above - gradients - workspace)
"""


@pytest.mark.parametrize(
    "dtypes",
    [("torch.float32", "None"), ("torch.bfloat16", "None"), ("torch.bfloat16", "torch.bfloat16")],
    ids=["float32", "bfloat16", "bfloat16 logits"],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_within_workspace_and_64_mib(dtypes, reduction):
    """[tokens, vocab] would be 96 MB in bfloat16 already, 192 MB in float32; the budget is 48 MiB."""
    needs_products_of(dtypes[0])
    above = in_a_process(_STEP, *dtypes, repr(reduction))
    assert above <= 64 << 20, f"{above / 2**20:.0f} MiB above gradients and workspace"


_ONE_MODEL = """
import sys, torch, kd_kernels as kd
call, dtype = sys.argv[1], eval(sys.argv[2])
torch.set_num_threads(2)
tokens, vocab, workspace, k = 1500, 32000, 48 << 20, 32

def step(n, v):
    h, w = torch.randn(n, 64).to(dtype), torch.randn(v, 64).to(dtype) / 8
    head = kd.Head(h.requires_grad_(), w.requires_grad_())
    ids = torch.randint(v, (n, k))
    target = kd.SparseTarget(ids, torch.randn(n, 2 * k).log_softmax(1)[:, :k])
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    if call == "sparse":
        loss = kd.distill(head, target, kd.JensenShannon(), labels=ids[:, 0], hard_weight=0.5,
                          workspace_bytes=workspace)
        loss.backward()
    elif call == "logprobs":
        logprobs, entropy = kd.linear_logprobs(head, ids, entropy=True, workspace_bytes=workspace)
        (logprobs.sum() + entropy.sum()).backward()
    else:
        kd.linear_topk(head, k, samples=20, seed=1, targets=ids[:, 0], workspace_bytes=workspace)
    weight = 0 if call == "topk" else v * 64
    return status("VmHWM") - before - weight * (4 + dtype.itemsize) - n * 64 * dtype.itemsize * 2

step(8, 500)  # libraries load and make their pools
kd.release_workspace()
print(step(tokens, vocab) - workspace)
"""


@pytest.mark.parametrize("call", ["sparse", "logprobs", "topk"])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_one_model_within_workspace_and_24_mib(call, dtype):
    """What is kept per saved entry, some ten float64 numbers of a chunk, is in the 24 MiB too."""
    needs_products_of(dtype)
    above = in_a_process(_ONE_MODEL, call, dtype)
    assert above <= 24 << 20, f"{above / 2**20:.0f} MiB above gradients and workspace"
