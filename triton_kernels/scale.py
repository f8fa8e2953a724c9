"""One number times many, cast on the way: what the backward pass does to a gradient that the forward found.

Torch takes a number that lies on the device for a tensor to broadcast, and then neither loads nor stores
more than one entry at a time: three times as slow as the memory allows.
"""

import triton
import triton.language as tl


@triton.jit
def scale(source, factor, out, count, BLOCK: tl.constexpr, F: tl.constexpr):
    """``out = source * factor``, in F; ``count`` entries one after the other."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < count
    product = tl.load(source + entries, mask=inside, other=0.0).to(F) * tl.load(factor).to(F)
    tl.store(out + entries, product.to(out.dtype.element_ty), mask=inside)
