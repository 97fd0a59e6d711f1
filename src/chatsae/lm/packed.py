"""One row of many sequences whose attention stays within each of them: no padding and no dense mask.

transformers looks up a model's attention by a name in its configuration. While `packed_row` lasts that name is ours.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from chatsae.lm.tap import Decoder

try:
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn
except ImportError:  # torch before 2.10
    _varlen_attn = None

ATTENTION = "chatsae_packed"
_LEAST_CHUNK = 128  # queries of a windowed sequence that share one call
# What models hand to every attention function, and what has no bearing on its result.
_HARMLESS = {"position_ids", "position_embeddings", "cache_position", "use_cache", "layer_idx"}


class PackingRefused(Exception):  # noqa: N818 - an answer, not an error: the model is read in another way
    """The model's attention has something that this one would have to ignore."""


class _Row:
    """The sequences of the forward under way, and what the model asked of its attention."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.bounds = [0, *accumulate(lengths)]
        self.longest = max(lengths)
        self.calls = 0
        self.masked: set[int] = set()  # widths of the local masks that the model asked for
        self.handed: set[int] = set()  # windows that its attention was told of
        self._cu_seqlens: dict[torch.device, Tensor] = {}

    def cu_seqlens(self, device: torch.device) -> Int[Tensor, " B1"]:
        if device not in self._cu_seqlens:
            self._cu_seqlens[device] = torch.tensor(self.bounds, dtype=torch.int32, device=device)
        return self._cu_seqlens[device]


_ROW: ContextVar[_Row | None] = ContextVar("chatsae_packed_row", default=None)


@contextmanager
def packed_row(lm: Decoder, lengths: Sequence[int]) -> Iterator[None]:
    """Let the next forward of `lm.decoder` read a row [1, N] as sequences of these lengths, each by itself.

    Positions start anew with each sequence. The model is as before when the context ends.

    Raises:
        PackingRefused: the model's attention cannot be replaced, or has a soft cap, sinks, a bias or anything else
            that only its own attention knows.
    """
    row = _Row(lengths)
    configs = {id(c): c for m in lm.decoder.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def with_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"position_ids": positions.to(kwargs["input_ids"].device)}

    handle = lm.decoder.register_forward_pre_hook(with_positions, with_kwargs=True)
    token = _ROW.set(row)
    try:
        for config, _ in before:
            config._attn_implementation = {"": ATTENTION}  # this configuration alone, not its sub-configurations
        yield
    finally:
        for config, name in before:
            config._attn_implementation = {"": name}
        _ROW.reset(token)
        handle.remove()
    if not row.calls:
        raise PackingRefused("its attention cannot be replaced")
    if row.masked - row.handed:
        raise PackingRefused(f"its attention is not told of the mask over {min(row.masked - row.handed)} tokens")


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 H N K"],
    key: Float[Tensor, "1 G N K"],
    value: Float[Tensor, "1 G N V"],
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Float[Tensor, "1 N H V"], None]:
    """Causal attention within each sequence of the row; H query heads share G key heads.

    Raises:
        PackingRefused: see `packed_row`.
    """
    row = _ROW.get()
    if row is None:
        raise PackingRefused("packed attention was called outside of a packed row")
    unknown = sorted(k for k, v in others.items() if k not in _HARMLESS and v is not None and v is not False)
    if unknown:
        raise PackingRefused(f"its attention takes {', '.join(unknown)}")
    if attention_mask is not None or is_causal is False or not getattr(module, "is_causal", True) or dropout:
        raise PackingRefused("its attention is more than causal attention")
    if key.shape[2] != row.bounds[-1] or query.shape[2] != row.bounds[-1]:
        raise PackingRefused(f"its attention has {query.shape[2]} queries and {key.shape[2]} keys")
    row.calls += 1
    if sliding_window is not None:
        row.handed.add(sliding_window)
    if _fits_varlen(query, value):
        return _varlen(row, query, key, value, sliding_window, scaling), None
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for start, stop in pairwise(row.bounds):
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        out[:, start:stop] = _one(q, k, v, sliding_window, scaling).transpose(1, 2)
    return out, None


def _one(
    query: Float[Tensor, "1 H n K"],
    key: Float[Tensor, "1 G n K"],
    value: Float[Tensor, "1 G n V"],
    window: int | None,
    scale: float | None,
) -> Float[Tensor, "1 H n V"]:
    """One sequence. A windowed one goes in chunks, each with the keys that it can see: memory stays linear."""
    sdpa = nn.functional.scaled_dot_product_attention
    n, gqa = query.shape[2], query.shape[1] != key.shape[1]
    if window is None or n <= window:
        return sdpa(query, key, value, is_causal=n > 1, scale=scale, enable_gqa=gqa)
    size = max(window, _LEAST_CHUNK)
    band, parts = _band(size, window, query.device), []
    for start in range(0, n, size):
        stop, low = min(start + size, n), max(0, start - window + 1)
        first = low - (start - window + 1)
        mask = band[: stop - start, first : first + stop - low]
        seen = slice(low, stop)
        parts.append(
            sdpa(
                query[:, :, start:stop], key[:, :, seen], value[:, :, seen], attn_mask=mask, scale=scale, enable_gqa=gqa
            )
        )
    return torch.cat(parts, dim=2)


@lru_cache(maxsize=8)
def _band(size: int, window: int, device: torch.device) -> Bool[Tensor, "S K"]:
    """Which keys each of `size` queries sees; the first key is `window` - 1 before the first query."""
    distance = torch.arange(size + window - 1, device=device) - torch.arange(size, device=device)[:, None]
    return (distance >= 0) & (distance < window)


@cache
def _has_varlen() -> bool:
    """Whether torch has a varlen kernel with windows and grouped heads (2.12 and later), and the GPU runs it."""
    if _varlen_attn is None or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    parameters = inspect.signature(_varlen_attn).parameters
    return {"window_size", "enable_gqa", "scale"} <= parameters.keys() and torch.cuda.get_device_capability() >= (8, 0)


def _fits_varlen(query: Float[Tensor, "1 H N K"], value: Float[Tensor, "1 G N V"]) -> bool:
    """The kernel wants half precision and one head size, a multiple of 8 up to 256."""
    half, size = query.dtype in (torch.float16, torch.bfloat16), query.shape[3]
    return query.is_cuda and half and size == value.shape[3] and size % 8 == 0 and size <= 256 and _has_varlen()


def _varlen(
    row: _Row,
    query: Float[Tensor, "1 H N K"],
    key: Float[Tensor, "1 G N K"],
    value: Float[Tensor, "1 G N K"],
    window: int | None,
    scale: float | None,
) -> Float[Tensor, "1 N H K"]:
    assert _varlen_attn is not None
    cu_seqlens = row.cu_seqlens(query.device)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out = _varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        row.longest,
        row.longest,
        scale=scale,
        # keys to the left of the query's own: a window of W tokens counts that one
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)  # nothing besides was asked for
    return out[None]


def _mask(*, local_size: int | None = None, use_vmap: bool = False, **_: object) -> None:
    """Build no mask, but note what it would have held."""
    row = _ROW.get()
    if use_vmap:
        raise PackingRefused("its mask is more than causal")
    if row is not None and local_size:  # 0: the configuration has no window
        row.masked.add(local_size)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, _mask)
