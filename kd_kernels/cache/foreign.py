"""What teachers emit today, as records that :meth:`CacheWriter.append` takes.

All hold log-probabilities of some tokens at one temperature, so ``lse`` is 0, and the tail is what is left
of 1, as far as float32 can tell. Row j of a record is the distribution after token j, of token j + 1,
whatever the source counts from. A row of which nothing is known has no ids; mask it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from kd_kernels.arguments import is_number
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.record import TeacherRecord
from kd_kernels.drivers.sparse import implied_log_tail

_BITS = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_ROUNDED_UP = 1e-3  # a log-probability may be above 0 by rounding
Pair = tuple[int, float]  # token id, log-probability


def from_vllm(
    prompt_logprobs: Sequence[Optional[Mapping]], k: int, temperature: float = 1.0
) -> TeacherRecord:
    """vLLM's ``prompt_logprobs``, the objects or their JSON.

    Alignment: entry i is the distribution of token i after the tokens before it; entry 0 is None. So entry
    i + 1 becomes row i, and the last row is unknown. An entry has up to k + 1 tokens: the realised one is
    added where it is not among the k, and left out here, or what is saved would depend on the data. Its rank
    says so, but not where it ties with the k-th: then the k largest are kept, ties by id.

    Args:
        prompt_logprobs: one mapping per token, ``{token id: {logprob, rank}}``.
        k: as in the request.
        temperature: at which they were made (vLLM's raw log-probabilities: 1).

    Raises:
        CacheError: an entry that is no such thing.
    """
    _check_request(k, temperature)
    rows: list[list[Pair]] = []
    for place, entry in enumerate(_rows_of("prompt_logprobs", prompt_logprobs)):
        if entry is None:
            rows.append([])
            continue
        try:
            found = [(_get(v, "rank"), (int(token), float(_get(v, "logprob")))) for token, v in entry.items()]
            ranked = any(rank is not None for rank, _ in found)
            row = [pair for rank, pair in found if (rank is not None and rank <= k) or not ranked]
            rows.append(sorted(row, key=_descending)[:k] if len(row) == k + 1 else row)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise CacheError(
                f"prompt_logprobs[{place}] is not a mapping of token ids to logprob and rank"
            ) from None
    return _shifted("prompt_logprobs", rows, k, temperature)


def from_sglang(
    input_top_logprobs: Sequence[Optional[Sequence]], k: int, temperature: float = 1.0
) -> TeacherRecord:
    """SGLang's ``meta_info["input_top_logprobs"]``.

    Alignment: entry i is the distribution of token i, as a list of ``[logprob, token id, text]``; entry 0 is
    None. So entry i + 1 becomes row i, and the last row is unknown. The request needs
    ``logprob_start_len=0``: with another, entries begin there, and not at token 0.

    Args:
        input_top_logprobs, k, temperature: as :func:`from_vllm`.

    Raises:
        CacheError: an entry that is no such thing.
    """
    _check_request(k, temperature)
    rows: list[list[Pair]] = []
    for place, entry in enumerate(_rows_of("input_top_logprobs", input_top_logprobs)):
        try:
            rows.append([(int(item[1]), float(item[0])) for item in (() if entry is None else entry)])
        except (TypeError, ValueError, IndexError, KeyError):
            raise CacheError(f"input_top_logprobs[{place}] is not a list of [logprob, id, text]") from None
    return _shifted("input_top_logprobs", rows, k, temperature)


def from_axolotl(row: Mapping[str, Any], k: int, temperature: float = 1.0) -> TeacherRecord:
    """A row of an axolotl KD data set as tokenised: ``target_token_ids``, ``target_logprobs``,
    ``target_mask``, each ``[L][k]``.

    Alignment: already that of a record: row j is of token j + 1, and the last row is masked. Earlier axolotl
    put row j on token j itself; such rows are refused where they can be told: by a last row that is not
    masked, or by the ``labels`` beside them. Log-probabilities were normalised over the k: the tail is next
    to nothing, and ``missing="renorm_both"`` is what axolotl trains.

    Args:
        row: of the data set.
        k: at least as many as a row has.
        temperature: axolotl's ``kd_temperature``, to which the values were brought.

    Raises:
        CacheError: columns that do not fit together, or are of token j.
    """
    _check_request(k, temperature)
    if not hasattr(row, "keys"):  # a row of pandas is no Mapping
        raise CacheError(f"row is {type(row).__name__}, not a mapping of columns")
    names = ("target_token_ids", "target_logprobs", "target_mask")
    missing = [name for name in names if name not in row]
    if missing:
        raise CacheError(f"row: {missing[0]} is not there; it has {', '.join(map(str, row))}")
    rows: list[list[Pair]] = []
    if len({len(_rows_of(name, row[name])) for name in names}) != 1:
        raise CacheError("target_token_ids, target_logprobs and target_mask do not have as many rows")
    for place, (ids, logprobs, mask) in enumerate(zip(*(row[name] for name in names))):
        try:
            fits = len(ids) == len(logprobs) == len(mask)
            rows.append([(int(i), float(p)) for i, p, used in zip(ids, logprobs, mask) if used])
        except (TypeError, ValueError):
            raise CacheError(
                f"target_token_ids[{place}] or what belongs to it is not a list of numbers"
            ) from None
        if not fits:
            raise CacheError(f"target_mask[{place}] does not have the length of ids and log-probabilities")
    _check_alignment(rows, row.get("labels"))
    return _record("target_token_ids", rows, k, temperature)


def from_distillkit(
    row: Mapping[str, Any], config: Mapping[str, Any], temperature: float = 1.0
) -> TeacherRecord:
    """A row of a DistillKit parquet data set: ``input_ids``, ``compressed_logprobs`` and
    ``bytepacked_indices``, ``[L - 1][bytes]``.

    Alignment: DistillKit's sampler drops the empty entry of token 0, so that row j is of token j + 1 already,
    and there is one row less than tokens: the last is unknown. A row per token is taken as it is.

    The codec (``distillkit/compression``): ids are unsigned numbers of ceil(log2(d)) bits, most significant
    first, in a row. Values, descending, or their differences with ``delta_encoding``, are ``exact_k`` numbers
    of ``exact_dtype``, then coefficients of ``polynomial_terms`` in the place, then for each of
    ``residual_bins`` a scale and its elements, signed by an offset of half their range.

    Args:
        row: of the data set.
        config: what lies beside it in ``compression_config.yaml``.
        temperature: at which the log-probabilities were made.

    Raises:
        CacheError: a row or config that is not of this codec (the older ``packed_indices`` are not read).
    """
    _check_temperature(temperature)
    try:
        d, k = int(config["d"]), int(config["k"])
        packed, values = _bytes(row["bytepacked_indices"]), _bytes(row["compressed_logprobs"])
        length = len(row["input_ids"])
        if d < 1 or k < 1:
            raise ValueError(f"d = {d}, k = {k}")
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CacheError(f"row or config is not DistillKit's: {type(error).__name__} {error}") from None
    if len(packed) != len(values) or not length - 1 <= len(values) <= length:
        raise CacheError(f"compressed_logprobs has {len(values)} rows for {length} input_ids")
    ids = _unpack("bytepacked_indices", packed, max(1, math.ceil(math.log2(d))), k)
    try:
        logprobs = _decompressed(values, config, k)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"config is not DistillKit's: {type(error).__name__} {error}") from None
    if not bool((logprobs < _ROUNDED_UP).all()):
        raise CacheError("compressed_logprobs holds numbers that are no log-probabilities")
    # A slot that the sampler could not fill has an id all the same, any id.
    ids = torch.where(logprobs == -math.inf, -1, ids)
    if ids.numel() and int(ids.max()) >= d:
        raise CacheError(f"bytepacked_indices holds {int(ids.max())}, outside the vocabulary of {d}")
    pad = (0, 0, 0, length - len(ids))
    ids = torch.nn.functional.pad(ids.to(torch.int32), pad, value=-1)
    return _finished(ids, torch.nn.functional.pad(logprobs.float(), pad, value=-math.inf), temperature)


# --- rows of pairs ------------------------------------------------------------------------------------


def _get(value: Any, name: str) -> Any:
    return value[name] if isinstance(value, Mapping) else getattr(value, name)


def _rows_of(name: str, value: Any) -> Sequence:
    try:
        len(value)
    except TypeError:
        raise CacheError(
            f"{name} is {type(value).__name__}, not a list with an entry for each token"
        ) from None
    return value


def _descending(pair: Pair) -> tuple[float, int]:
    return -pair[1], pair[0]


def _check_request(k: int, temperature: float) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise CacheError(f"k must be an integer >= 1, got {k!r}")
    _check_temperature(temperature)


def _check_temperature(temperature: float) -> None:
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise CacheError(f"temperature must be a number > 0, got {temperature!r}")


def _check_alignment(rows: list[list[Pair]], labels: Optional[Sequence[int]]) -> None:
    """Axolotl's: row j is of token j + 1, which has to be there and to be trained on."""
    try:
        trained = [True] * len(rows) if labels is None else [int(label) != -100 for label in labels]
    except (TypeError, ValueError):
        raise CacheError("labels is not a list of integers") from None
    if len(trained) != len(rows):
        raise CacheError(f"labels has {len(trained)} tokens and target_token_ids {len(rows)} rows")
    for place, found in enumerate(rows):
        last = place + 1 == len(rows)
        if found and (last or not trained[place + 1]):
            what = "nothing comes after it" if last else f"labels[{place + 1}] is -100"
            raise CacheError(
                f"target_mask[{place}] counts a row of token {place + 1}, but {what}: rows seem to be of "
                f"token j, as earlier axolotl wrote them; move the columns one row up, the last one masked"
            )


def _shifted(name: str, rows: list[list[Pair]], k: int, temperature: float) -> TeacherRecord:
    if rows and rows[0]:
        raise CacheError(f"{name}[0] is of the first token, which nothing comes before: it has to be None")
    return _record(name, [*rows[1:], []][: len(rows)], k, temperature, begin=1)


def _record(name: str, rows: list[list[Pair]], k: int, temperature: float, begin: int = 0) -> TeacherRecord:
    """Of rows whose first one was ``name[begin]``."""
    ids = torch.full((len(rows), k), -1, dtype=torch.int32)
    logprobs = torch.full((len(rows), k), -math.inf)
    for place, row in enumerate(rows):
        where = f"{name}[{place + begin}]"
        if len(row) > k:
            raise CacheError(f"{where} has {len(row)} tokens, and k is {k}")
        row = sorted(row, key=_descending)
        if not all(0 <= token < 1 << 31 and logprob < _ROUNDED_UP for token, logprob in row):
            raise CacheError(f"{where} has ids or log-probabilities that are none")
        if len({token for token, _ in row}) != len(row):
            raise CacheError(f"{where} has a token twice")
        if row:
            ids[place, : len(row)] = torch.tensor([pair[0] for pair in row], dtype=torch.int32)
            logprobs[place, : len(row)] = torch.tensor([pair[1] for pair in row])
    return _finished(ids, logprobs, temperature)


def _finished(ids: Tensor, logprobs: Tensor, temperature: float) -> TeacherRecord:
    """The record whose ``logits / temperature - 0`` are the log-probabilities."""
    inside = torch.where(ids < 0, -math.inf, logprobs).double().exp().sum(-1)
    tail = implied_log_tail(inside).float()
    lse = torch.zeros(len(ids))
    return TeacherRecord(ids, logprobs * temperature, lse, tail, None, float(temperature))


# --- DistillKit's codec -------------------------------------------------------------------------------


def _bytes(rows: Sequence[Sequence[int]]) -> Tensor:
    # One by one, as pandas has them: an array of arrays.
    found = (
        torch.stack([torch.as_tensor(row) for row in rows])
        if len(rows)
        else torch.empty(0, 0, dtype=torch.uint8)
    )
    if found.dim() != 2 or found.is_floating_point() or bool(((found < 0) | (found > 255)).any()):
        raise ValueError("bytes are integers from 0 to 255, as many in each row")
    return found.to(torch.uint8)


def _unpack(name: str, packed: Tensor, bits: int, count: int) -> Tensor:
    """``[N, bytes]`` as ``[N, count]`` unsigned numbers of ``bits`` bits, most significant first."""
    if not len(packed):
        return torch.empty(0, count, dtype=torch.int64)
    if packed.shape[1] != (bits * count + 7) // 8:
        raise CacheError(f"{name} has {packed.shape[1]} bytes a row for {count} numbers of {bits} bits")
    flat = (packed[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    numbers = flat.flatten(1)[:, : bits * count].reshape(len(packed), count, bits).to(torch.int64)
    return (numbers << torch.arange(bits - 1, -1, -1)).sum(-1)


class _Bytes:
    """Reads one field after the other of every row."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.at = rows, 0

    def take(self, size: int) -> Tensor:
        self.at += size
        if self.at > self.rows.shape[1]:
            raise CacheError(f"compressed_logprobs has {self.rows.shape[1]} bytes, too few for its config")
        # Not contiguous(), which leaves a single row in its place, where other types may not be read.
        return self.rows[:, self.at - size : self.at].clone(memory_format=torch.contiguous_format)

    def floats(self, dtype: str, count: int) -> Tensor:
        if dtype not in _BITS:
            raise CacheError(f"config: dtype {dtype!r} is none of {', '.join(_BITS)}")
        return self.take(count * _BITS[dtype].itemsize).view(_BITS[dtype])


def _decompressed(values: Tensor, config: Mapping[str, Any], k: int) -> Tensor:
    if not len(values):
        return torch.empty(0, k)
    exact_k, data = int(config["exact_k"]), _Bytes(values)
    exact_dtype = config.get("exact_dtype", "float32")
    exact = data.floats(exact_dtype, exact_k) if exact_k else torch.empty(len(values), 0)
    terms = config.get("polynomial_terms") or ()
    places = torch.arange(k - exact_k, dtype=torch.float32)
    if config.get("normalize_t"):
        places = torch.linspace(0, 1, k - exact_k)
    rest = torch.zeros(len(values), k - exact_k)
    if terms:
        coefficients = data.floats(config.get("term_dtype", "float32"), len(terms)).float()
        rest = coefficients @ torch.stack([_term(term, places) for term in terms])
    begin = 0
    for bin_ in config.get("residual_bins") or ():
        bits, count = int(bin_["element_bits"]), int(bin_["num_elements"])
        scale = data.floats(bin_["scale_dtype"], 1).float()
        numbers = _unpack("compressed_logprobs", data.take((bits * count + 7) // 8), bits, count)
        signed = numbers * 2 - 1 if bits == 1 else numbers - (1 << (bits - 1))
        rest[:, begin : begin + count] += signed * scale
        begin += count
    if data.at != values.shape[1]:
        raise CacheError(f"compressed_logprobs has {values.shape[1]} bytes a row, its config makes {data.at}")
    found = torch.cat([exact.float(), rest.to(_BITS[exact_dtype]).float()], dim=-1)
    return found.cumsum(-1) if config.get("delta_encoding", True) else found


def _term(term: Any, places: Tensor) -> Tensor:
    if isinstance(term, int):
        return places**term
    if term not in ("sqrt", "exp"):
        raise CacheError(f"config: polynomial_terms has {term!r}, which is neither a power, sqrt nor exp")
    return places.sqrt() if term == "sqrt" else places.exp()
