"""The two ends of the chunked walk: how one model's logits come about and where their gradient goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import Tensor

from kd_kernels.drivers.tokens import Tokens
from kd_kernels.drivers.workspace import Workspace, fresh, lend
from kd_kernels.gemm import as_matrix, matmul
from kd_kernels.rows import Rows

# A float while it is one number that the host knows; else a tensor: 0-d, or one number per token ``[N]``.
Number = Union[float, Tensor]


@dataclass
class Model:
    """One model as the op received it."""

    values: Tensor  # hidden [..., D], or logits [..., V] where weight is None
    weight: Optional[Tensor]  # [V, D]
    bias: Optional[Tensor]  # [V]
    scale: float
    softcap: float  # 0: none
    temperature: Number
    needs: tuple[bool, bool, bool]  # gradient of values, weight, bias
    later: bool = False  # whether a walk to come finds gradients: it has to fit the workspace, too
    split: bool = False  # whether this is a part of the vocabulary, and d hidden a summand

    @property
    def token_count(self) -> int:
        return self.values.shape[:-1].numel()

    @property
    def vocab_size(self) -> int:
        return self.values.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def is_head(self) -> bool:
        return self.weight is not None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def hidden_gradient_dtype(dtype: torch.dtype, split: bool = False) -> torch.dtype:
    """What d hidden is kept in until it is scaled: float16 has no room for sums before the denominator, and
    parts of a vocabulary that is split cancel in their sum only."""
    return accumulate_dtype(dtype) if split or dtype == torch.float16 else dtype


class HeadEnd:
    """What all walks need of a head, whether they cut the tokens or the vocabulary."""

    def __init__(
        self,
        model: Model,
        vocab: int,
        tokens: Tokens,
        compute_dtype: Optional[torch.dtype],
        logits_dtype: Optional[torch.dtype],
    ) -> None:
        self.model, self.vocab, self.tokens = model, vocab, tokens
        dtype = compute_dtype or model.values.dtype
        self.wide = accumulate_dtype(dtype)
        self.logits_dtype = logits_dtype or self.wide
        if self.logits_dtype not in (dtype, self.wide):
            raise ValueError(
                f"logits_dtype must be None, {self.wide} or the dtype that the heads compute in; "
                f"got {self.logits_dtype} for a head in {dtype}"
            )
        hidden = model.values.reshape(-1, model.values.shape[-1])
        # Silenced: d weight would meet what such a row holds, NaN included.
        self.hidden = tokens.take(tokens.silenced(hidden)).to(dtype)
        self.d_hidden: Optional[Tensor] = None
        self.d_weight: Optional[Tensor] = None
        self.d_bias: Optional[Tensor] = None

    def cleared(self, gradient: Tensor) -> Tensor:
        """``[V, ...]``, zeros where the walk writes nothing: at entries cut off by vocab="truncate", and
        everywhere without a token."""
        gradient[self.vocab if self.hidden.shape[0] else 0 :].zero_()
        return gradient

    @property
    def wants_gradient(self) -> bool:
        return any(self.model.needs)

    @property
    def gradient_in_place(self) -> bool:
        """The gradient has the compute dtype: it fits over the logits where they have it too."""
        return self.logits_dtype == self.hidden.dtype

    def of_all(self, d_hidden: Optional[Tensor]) -> Optional[Tensor]:
        """From the tokens walked to the shape of the hidden states."""
        return None if d_hidden is None else self.tokens.put_back(d_hidden).view(self.model.values.shape)


class HeadSide(HeadEnd):
    """Logits from one chunk-wide GEMM; gradients carried back by two more.

    In the vocabulary-major layout a chunk is stored ``[V, c]`` (``weight @ hidden.T``): tokens run
    through the vector lanes of the row kernel, and all three GEMMs read their operands along unit
    strides, which measures faster than the row-major ``[c, V]``. Row-major serves calls in which the
    other model's logits exist already, as rows.
    """

    def __init__(
        self,
        model: Model,
        vocab: int,
        tokens: Tokens,
        compute_dtype: Optional[torch.dtype],
        logits_dtype: Optional[torch.dtype],
        vocabulary_major: bool,
    ) -> None:
        assert model.weight is not None
        super().__init__(model, vocab, tokens, compute_dtype, logits_dtype)
        self.vocabulary_major = vocabulary_major
        dtype = self.hidden.dtype
        self.weight = as_matrix(model.weight[:vocab].to(dtype))
        self.bias = None if model.bias is None else model.bias[:vocab].to(self.logits_dtype)
        self.offsets: dict[int, Tensor] = {}
        if model.needs[0]:
            # Rows one after the other, whatever the hidden states have: a product writes into some of them.
            self.d_hidden = torch.empty_like(
                self.hidden,
                dtype=hidden_gradient_dtype(dtype, model.split),
                memory_format=torch.contiguous_format,
            )
        if model.needs[1]:
            self.d_weight = self.cleared(lend(model.weight.shape, self.wide, model.weight.device))
        if model.needs[2]:
            assert model.bias is not None
            self.d_bias = torch.zeros(model.bias.shape, dtype=self.wide, device=model.bias.device)

    def buffer_itemsizes(self, later: bool = False) -> list[int]:
        """Bytes per (token, vocabulary entry) of each workspace tensor."""
        sizes = [self.logits_dtype.itemsize]
        if (self.wants_gradient or later and self.model.later) and not self.gradient_in_place:
            sizes.append(self.hidden.dtype.itemsize)
        return sizes

    def project(self, start: int, stop: int, workspace: Workspace, temperature: Tensor) -> Rows:
        """GEMM one chunk's logits into the workspace."""
        x, c = self.hidden[start:stop], stop - start
        shape = (self.vocab, c) if self.vocabulary_major else (c, self.vocab)
        logits = workspace.take(*shape, self.logits_dtype)
        if self.bias is not None:
            logits.copy_(self.bias[:, None] if self.vocabulary_major else self.bias)
        a, b = (self.weight, x.t()) if self.vocabulary_major else (x, self.weight.t())
        matmul(a, b, logits, accumulate=self.bias is not None)
        grad = None
        if self.wants_gradient:
            grad = logits if self.gradient_in_place else workspace.take(*shape, self.hidden.dtype)
        rows = Rows(logits, None, temperature, self.model.scale, self.model.softcap, grad)
        if not self.vocabulary_major:
            rows.offsets, rows.multiple = self._row_offsets(logits), logits.stride(0)
            if grad is not None:
                rows.grad_offsets, rows.grad_multiple = self._row_offsets(grad), grad.stride(0)
        return rows

    def _row_offsets(self, chunk: Tensor) -> Tensor:
        """Where the rows start; computed once for all chunks, of which none has more rows than the first."""
        c, stride = chunk.shape[0], chunk.stride(0)
        if stride not in self.offsets:
            self.offsets[stride] = torch.arange(0, c * stride, stride, device=chunk.device)
        return self.offsets[stride][:c]

    def carry(self, start: int, stop: int, rows: Rows) -> None:
        """GEMM one chunk's logit gradient on to the hidden states and the weight."""
        grad = rows.grad
        if grad is None:
            return
        by_vocab = grad if self.vocabulary_major else grad.t()  # [V, c]
        if self.d_hidden is not None:
            matmul(by_vocab.t(), self.weight, self.d_hidden[start:stop])
        if self.d_weight is not None:
            matmul(by_vocab, self.hidden[start:stop], self.d_weight[: self.vocab], accumulate=start > 0)
        if self.d_bias is not None:
            self.d_bias[: self.vocab] += by_vocab.sum(1, dtype=self.wide)

    def gradients(self) -> list[Optional[Tensor]]:
        """(d hidden by :func:`hidden_gradient_dtype`, d weight and d bias in the accumulator's), or None."""
        return [self.of_all(self.d_hidden), self.d_weight, self.d_bias]


class LogitsSide:
    """Logits that exist already: read where they lie, whatever their leading strides; or a copy of each
    chunk, for a kernel that scribbles in them."""

    def __init__(self, model: Model, vocab: int, tokens: Tokens, copy: bool = False) -> None:
        self.model, self.vocab, self.copy = model, vocab, copy
        values = model.values
        if values.stride(-1) != 1 and values.shape[-1] > 1:
            values = values.contiguous()  # the kernels read a row along a unit stride
        self.values = values
        offsets = _row_offsets(values)
        if copy:
            token = tokens.take(torch.arange(tokens.count, device=values.device))
            self.place = _unravelled(token, values.shape[:-1])
        self.offsets = tokens.take(offsets)
        self.grad: Optional[Tensor] = None
        self.grad_offsets: Optional[Tensor] = None
        if model.needs[0]:
            whole = tokens.rows is None and vocab == values.shape[-1]
            self.grad = fresh(values.shape, values.dtype, values.device)
            if not whole:
                self.grad.zero_()
            grad_offsets = offsets if values.is_contiguous() else _row_offsets(self.grad)
            self.grad_offsets = tokens.take(grad_offsets)

    def buffer_itemsizes(self, later: bool = False) -> list[int]:
        return [self.values.itemsize] if self.copy else []

    def project(self, start: int, stop: int, workspace: Workspace, temperature: Tensor) -> Rows:
        grad_offsets = None if self.grad_offsets is None else self.grad_offsets[start:stop]
        values, offsets, multiple = self.values, self.offsets[start:stop], _common_divisor(self.values)
        if self.copy:
            values = workspace.take(stop - start, self.vocab, values.dtype)
            values.copy_(self.values[tuple(i[start:stop] for i in self.place)][..., : self.vocab])
            multiple = values.stride(0)
            offsets = torch.arange(stop - start, device=values.device) * multiple
        return Rows(
            values,
            offsets,
            temperature,
            self.model.scale,
            self.model.softcap,
            self.grad,
            grad_offsets,
            multiple=multiple,
            grad_multiple=self.values.shape[-1],
        )

    def carry(self, start: int, stop: int, rows: Rows) -> None:
        """Nothing: the row kernel wrote the gradient where it belongs."""

    def gradients(self) -> list[Optional[Tensor]]:
        return [self.grad, None, None]


def side_of(
    model: Model,
    vocab: int,
    tokens: Tokens,
    compute_dtype: Optional[torch.dtype],
    logits_dtype: Optional[torch.dtype],
    vocabulary_major: bool = False,
    copy: bool = False,
) -> Union[HeadSide, LogitsSide]:
    """A model's end of a walk, whatever the model is; ``copy`` asks existing logits for scratch memory."""
    if not model.is_head:
        return LogitsSide(model, vocab, tokens, copy)
    return HeadSide(model, vocab, tokens, compute_dtype, logits_dtype, vocabulary_major)


def _common_divisor(values: Tensor) -> int:
    """Of all row offsets; 0, which everything divides, where there is one row."""
    leading = zip(values.shape[:-1], values.stride()[:-1])
    return math.gcd(*(stride for size, stride in leading if size > 1))


def _unravelled(token: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """As ``torch.unravel_index``, which copies the shape to the device and so waits for it."""
    place: list[Tensor] = []
    for size in reversed(shape):
        place.insert(0, token % size)
        token = token // size
    return tuple(place)


def _row_offsets(values: Tensor) -> Tensor:
    """``[tokens]`` int64: where each row starts, in elements from the tensor's first."""
    if values.is_contiguous():
        tokens, size = values.shape[:-1].numel(), max(values.shape[-1], 1)
        return torch.arange(0, tokens * size, size, device=values.device)
    offsets = torch.zeros((), dtype=torch.int64, device=values.device)
    for size, stride in zip(values.shape[:-1], values.stride()[:-1]):
        offsets = offsets[..., None] + torch.arange(size, device=values.device) * stride
    return offsets.reshape(-1)
