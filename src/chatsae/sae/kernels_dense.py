"""The compiled loops of the dense step, between its matrix products (see `chatsae.sae.kernels` for the letters).

Everything lies by feature: hidden_pre and feature_acts are [F, N].
"""

import math

from chatsae.sae.kernels import REORDER, jit


@jit(False)
def relu(first, last, z, b_enc, fired, penalties):
    """z becomes relu(z + b_enc), NaN where it is NaN; per feature the tokens on which it is active and its sum."""
    for f in range(first, last):
        row, b, n, zero = z[f], b_enc[f], 0, z.dtype.type(0)
        total = zero
        for t in range(row.size):
            value = row[t] + b
            active = not (value <= zero)
            row[t] = value if active else zero
            n += active
        for t in range(row.size):
            total += row[t]
        fired[f], penalties[f] = n, total


@jit(False)
def jump(first, last, z, b_enc, low, theta, acts, fired, near):
    """z becomes z + b_enc, acts what of it exceeds theta; near[f]: the tokens on which it exceeds low."""
    for f in range(first, last):
        row, out, b, n, m, zero = z[f], acts[f], b_enc[f], 0, 0, z.dtype.type(0)
        for t in range(row.size):
            value = row[t] + b
            active = not (value <= theta[f])
            row[t] = value
            out[t] = value if active else zero
            n += active
            m += not (value <= low[f])
        fired[f], near[f] = n, m


@jit(REORDER)
def errors(first, last, x, b_dec, two_n, out, mse):
    """out, the decoder's product, becomes d mse / d sae_out; mse[t]: the squared error of token t."""
    for t in range(first, last):
        e, target, square = out[t], x[t], x.dtype.type(0)
        for j in range(e.size):
            e[j] += b_dec[j] - target[j]
            square += e[j] * e[j]
            e[j] *= two_n
        mse[t] = square


@jit(REORDER)
def relu_back(first, last, acts, d_acts, l1, g_b):
    """d_acts becomes d loss / d hidden_pre; l1[f]: what the penalty adds to it where the feature is active."""
    for f in range(first, last):
        row, back, more, zero = acts[f], d_acts[f], l1[f], acts.dtype.type(0)
        total = zero
        for t in range(row.size):
            value = back[t] + more if row[t] > zero else zero
            back[t] = value
            total += value
        g_b[f] = total


@jit(REORDER)
def jump_back(first, last, z, d_acts, theta, bandwidth, half, l0, g_b, g_theta):
    """d_acts becomes d loss / d hidden_pre; g_theta: through the straight-through estimators."""
    for f in range(first, last):
        row, back, bound, zero = z[f], d_acts[f], theta[f], z.dtype.type(0)
        total = pull = zero
        for t in range(row.size):
            d, value = back[t], row[t]
            pull += (bound * d + l0) / bandwidth if abs((value - bound) / bandwidth) < half else zero
            value = d if value > bound else zero
            back[t] = value
            total += value
        g_b[f], g_theta[f] = total, -pull


@jit(REORDER)
def pull_and_square(first, last, grads, W, pulls, squares):
    """grads[f] += pulls[f] W[f]; squares[f]: its squared norm then."""
    for f in range(first, last):
        g, w, pull, square = grads[f], W[f], pulls[f], grads.dtype.type(0)
        if pull != 0:
            for j in range(g.size):
                g[j] += pull * w[j]
        for j in range(g.size):
            square += g[j] * g[j]
        squares[f] = square


@jit(REORDER)
def norms(first, last, W, out):
    for f in range(first, last):
        w, square = W[f], W.dtype.type(0)
        for j in range(w.size):
            square += w[j] * w[j]
        out[f] = math.sqrt(square)


@jit(REORDER)
def normalise(first, last, W, tiny):
    """Every row gets unit norm; rows of zeros stay."""
    for f in range(first, last):
        w, square = W[f], W.dtype.type(0)
        for j in range(w.size):
            square += w[j] * w[j]
        norm = max(math.sqrt(square), tiny)
        for j in range(w.size):
            w[j] /= norm
