"""The Triton kernels that end a step: losses and clipping, then Adam. Letters as in `chatsae.sae.triton_kernels`."""

import triton.language as tl

from chatsae.sae.triton_kernels import (
    BETA1,
    BETA2,
    CLIP,
    EPS,
    GATE,
    MAX_NORM,
    PENALTY,
    POISON,
    ROOT2,
    STEP_SIZE,
    TINY,
    _jit,
)

MOST_PARTS = 32


@_jit
def totals(
    squares, n_squares, errors, n_errors, reg, firings, F, parts,
    JUMP: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[4, PARTS]: sums over squares, errors, reg and firings, in float64."""
    part = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    square = tl.zeros([BLOCK], dtype=tl.float64)
    error = tl.zeros([BLOCK], dtype=tl.float64)
    penalty = tl.zeros([BLOCK], dtype=tl.float64)
    fires = tl.zeros([BLOCK], dtype=tl.float64)
    for at in range(part * BLOCK, n_squares, PARTS * BLOCK):
        square += tl.load(squares + at + i, mask=at + i < n_squares, other=0.0).to(tl.float64)
    for at in range(part * BLOCK, n_errors, PARTS * BLOCK):
        error += tl.load(errors + at + i, mask=at + i < n_errors, other=0.0).to(tl.float64)
    for at in range(part * BLOCK, F, PARTS * BLOCK):
        fires += tl.load(firings + at + i, mask=at + i < F, other=0.0).to(tl.float64)
        if not JUMP:
            penalty += tl.load(reg + at + i, mask=at + i < F, other=0.0).to(tl.float64)
    tl.store(parts + part, tl.sum(square, 0))
    tl.store(parts + PARTS + part, tl.sum(error, 0))
    tl.store(parts + 2 * PARTS + part, tl.sum(penalty, 0))
    tl.store(parts + 3 * PARTS + part, tl.sum(fires, 0))


@_jit
def finish(parts, numbers, scalars, losses, N, JUMP: tl.constexpr, PARTS: tl.constexpr):
    """losses = total, mse, sparsity, l0; scalars = what clipping multiplies with, and whether anything may be changed.

    From the first loss or gradient on that is not finite, nothing may be, and the total is NaN.
    """
    i = tl.arange(0, PARTS)
    norm = tl.sqrt(tl.sum(tl.load(parts + i), 0))
    mse = tl.sum(tl.load(parts + PARTS + i), 0) / N
    l0 = tl.sum(tl.load(parts + 3 * PARTS + i), 0) / N
    sparsity = tl.load(numbers + PENALTY) * (l0 if JUMP else tl.sum(tl.load(parts + 2 * PARTS + i), 0) / N)
    total = mse + sparsity
    finite = ((total - total) == 0) & ((norm - norm) == 0) & (tl.load(scalars + POISON) == 0)
    tl.store(scalars + CLIP, tl.minimum(tl.load(numbers + MAX_NORM) / (norm + 1e-6), 1.0))
    tl.store(scalars + GATE, tl.where(finite, 1.0, 0.0))
    tl.store(scalars + POISON, tl.where(finite, 0.0, 1.0))
    kind = losses.dtype.element_ty
    tl.store(losses, tl.where(finite, total, float("nan")).to(kind))
    tl.store(losses + 1, mse.to(kind))
    tl.store(losses + 2, sparsity.to(kind))
    tl.store(losses + 3, l0.to(kind))


@_jit
def _adam(P, M, V, at, here, g, scale, numbers, scalars):
    """torch.optim.Adam on some elements, clipping folded in; `scale` is applied to them first. Returns the new ones."""
    clip = tl.load(scalars + CLIP).to(g.dtype)
    go = tl.load(scalars + GATE).to(tl.int32)
    keep = here & (go > 0)
    beta1 = tl.load(numbers + BETA1)
    beta2 = tl.load(numbers + BETA2)
    u = g * clip
    m = tl.load(M + at, mask=here, other=0.0)
    v = tl.load(V + at, mask=here, other=0.0)
    m += (1.0 - beta1).to(g.dtype) * (u - m)
    v = beta2.to(g.dtype) * v + (1.0 - beta2).to(g.dtype) * u * u
    step_size = tl.load(numbers + STEP_SIZE).to(g.dtype)
    slow = tl.sqrt(v) * tl.load(numbers + ROOT2).to(g.dtype) + tl.load(numbers + EPS).to(g.dtype)
    p = tl.load(P + at, mask=here, other=0.0) * scale - step_size * (m / slow)
    tl.store(P + at, p, mask=keep)
    tl.store(M + at, m, mask=keep)
    tl.store(V + at, v, mask=keep)
    return p


@_jit
def _bfloat16(p):
    """The nearest bfloat16 as its bits; by hand, as the interpreter would cut it off."""
    bits = p.to(tl.float32).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@_jit
def update_rows(
    P, M, V, step, G, listed, norms, half, numbers, scalars, F, D,
    SPARSE: tl.constexpr, UNIT: tl.constexpr, NORMS: tl.constexpr, HALF: tl.constexpr,
    R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One step of Adam on W_dec or W_enc.

    SPARSE: rows without listed pairs have no gradient, and what lies in G is not read. UNIT: rows are scaled to unit
    norm first. NORMS: norms of the new rows are kept for the next step. HALF: a bfloat16 copy is kept in `half`.
    """
    f = tl.program_id(0) * R + tl.arange(0, R)
    j = tl.arange(0, BD)
    here = (f < F)[:, None] & (j < D)[None, :]
    at = f.to(tl.int64)[:, None] * D + j[None, :]
    touched = here
    if SPARSE:
        touched = here & (tl.load(listed + f, mask=f < F, other=0) > 0)[:, None]
    g = tl.load(G + at, mask=touched, other=0.0)
    scale = tl.full([R, 1], 1.0, dtype=P.dtype.element_ty)
    if UNIT:
        norm = tl.load(norms + f, mask=f < F, other=1.0)[:, None]
        scale = 1.0 / tl.maximum(norm, tl.load(numbers + TINY).to(norm.dtype))
    p = _adam(P, M, V, at, here, g, scale, numbers, scalars)
    go = tl.load(scalars + GATE).to(tl.int32)
    if NORMS:
        tl.store(norms + f, tl.sqrt(tl.sum(tl.where(here, p * p, 0.0), 1)), mask=(f < F) & (go > 0))
    if HALF:
        tl.store(half + at, _bfloat16(p), mask=here & (go > 0))
    if tl.program_id(0) == 0:
        tl.store(step, tl.load(step) + go.to(tl.float32))


@_jit
def update_vector(P, M, V, step, G, numbers, scalars, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    g = tl.load(G + at, mask=here, other=0.0)
    _adam(P, M, V, at, here, g, tl.full([BLOCK], 1.0, dtype=P.dtype.element_ty), numbers, scalars)
    if tl.program_id(0) == 0:
        tl.store(step, tl.load(step) + tl.load(scalars + GATE).to(tl.float32))


@_jit
def update_features(
    P_dec, M_dec, V_dec, step_dec, P_enc, M_enc, V_enc, step_enc,
    z, theta, d_out, sae_in, d_acts, pulls, ends, listed, tokens, norms, half, numbers, scalars, N, F, D, capacity,
    UNIT: tl.constexpr, WEIGHTED: tl.constexpr, NORMS: tl.constexpr, HALF: tl.constexpr,
    R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of W_dec and W_enc and Adam on them in one kernel: the gradients are never in memory."""
    f = tl.program_id(0) * R + tl.arange(0, R)
    j = tl.arange(0, BD)
    inside, columns = f < F, (j < D)[None, :]
    here = inside[:, None] & columns
    at = f.to(tl.int64)[:, None] * D + j[None, :]
    fit = tl.load(ends + F - 1) <= capacity
    count = tl.load(listed + f, mask=inside, other=0)
    begin = tl.load(ends + f, mask=inside, other=0) - count
    steps = tl.where(inside, tl.where(fit, count, N), 0)
    th = tl.load(theta + f, mask=inside, other=0.0)
    g_dec = tl.zeros([R, BD], dtype=P_dec.dtype.element_ty)
    g_enc = tl.zeros([R, BD], dtype=P_dec.dtype.element_ty)
    for k in range(0, tl.max(steps, 0)):
        live = k < steps
        t = tl.load(tokens + begin + k, mask=live & fit, other=k).to(tl.int64)
        v = tl.load(z + t * F + f, mask=live, other=0.0)
        a = tl.where(((v > th) | (v != v)) & live, v, 0.0)
        d = tl.load(d_acts + t * F + f, mask=live, other=0.0)
        pair = t[:, None] * D + j[None, :]
        g_dec += a[:, None] * tl.load(d_out + pair, mask=live[:, None] & columns, other=0.0)
        g_enc += d[:, None] * tl.load(sae_in + pair, mask=live[:, None] & columns, other=0.0)
    if WEIGHTED:
        pull = tl.load(pulls + f, mask=inside, other=0.0)
        g_dec += pull[:, None] * tl.load(P_dec + at, mask=here, other=0.0)
    one = tl.full([R, 1], 1.0, dtype=P_dec.dtype.element_ty)
    scale = one
    if UNIT:
        norm = tl.load(norms + f, mask=inside, other=1.0)[:, None]
        scale = 1.0 / tl.maximum(norm, tl.load(numbers + TINY).to(norm.dtype))
    p = _adam(P_dec, M_dec, V_dec, at, here, g_dec, scale, numbers, scalars)
    go = tl.load(scalars + GATE).to(tl.int32)
    if NORMS:
        tl.store(norms + f, tl.sqrt(tl.sum(tl.where(here, p * p, 0.0), 1)), mask=inside & (go > 0))
    p = _adam(P_enc, M_enc, V_enc, at, here, g_enc, one, numbers, scalars)
    if HALF:
        tl.store(half + at, _bfloat16(p), mask=here & (go > 0))
    if tl.program_id(0) == 0:
        tl.store(step_dec, tl.load(step_dec) + go.to(tl.float32))
        tl.store(step_enc, tl.load(step_enc) + go.to(tl.float32))
