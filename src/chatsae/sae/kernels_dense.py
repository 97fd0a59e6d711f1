"""The compiled loops of the dense step, between its matrix products (see `chatsae.sae.kernels` for the letters).

Everything lies by feature or by dimension: hidden_pre and feature_acts are [F, N], inputs and outputs [D, N].
"""

from chatsae.sae.kernels import REORDER, jit


@jit(False)
def turn(x, b_dec, subtract, xT, inputs):
    """x [N, D] and what of it goes to the encoder, both [D, N]."""
    (n, d), tile = x.shape, 16
    for t0 in range(0, n, tile):
        for j in range(d):
            for t in range(t0, min(t0 + tile, n)):
                xT[j, t] = x[t, j]
    for j in range(d):
        row, to, less = xT[j], inputs[j], b_dec[j] if subtract else x.dtype.type(0)
        for t in range(n):
            to[t] = row[t] - less


@jit(REORDER)
def relu(first, last, z, b_enc, norms, weighted, l1, fired, penalties, pulls, crosses, more):
    """z becomes relu(z + b_enc), NaN where it is NaN; fired[f]: the tokens on which it is active.

    The penalty of a feature is l1 (sum of its acts), times the norm of its decoder row w if `weighted`, which then gets
    pulls[f] w as a gradient more, of squared norm crosses[f]. more[f]: what the penalty adds to d acts.
    """
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
        pulls[f], crosses[f], more[f] = zero, zero, l1
        if weighted:
            more[f] = l1 * norms[f]
            if norms[f] > 0:
                pulls[f], crosses[f] = total * l1 / norms[f], total * l1 * total * l1
        fired[f], penalties[f] = n, total * more[f]


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
def errors(first, last, xT, b_dec, two_n, out, mse):
    """out [D, N], the decoder's product, becomes d mse / d sae_out; mse[t]: the squared error of token t."""
    square = mse[first:last]
    square[:] = 0
    for j in range(xT.shape[0]):
        e, target, b = out[j, first:last], xT[j, first:last], b_dec[j]
        for t in range(e.size):
            e[t] += b - target[t]
            square[t] += e[t] * e[t]
            e[t] *= two_n


@jit(REORDER)
def relu_back(first, last, acts, d_acts, more, pulls, crosses, g_b):
    """d_acts becomes d loss / d hidden_pre. crosses[f] grows to what the pull adds to the squared norm of the gradient
    of the decoder row w: that is the sum of acts d_out, whose product with w is the sum of acts d_acts."""
    for f in range(first, last):
        row, back, add, zero = acts[f], d_acts[f], more[f], acts.dtype.type(0)
        total = along = zero
        for t in range(row.size):
            along += row[t] * back[t]
            value = back[t] + add if row[t] > zero else zero
            back[t] = value
            total += value
        g_b[f] = total
        crosses[f] += (pulls[f] + pulls[f]) * along


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
def squares(first, last, grads, crosses, out):
    """The squared norms of the gradients of the rows, and crosses."""
    for f in range(first, last):
        g, square = grads[f], crosses[f]
        for j in range(g.size):
            square += g[j] * g[j]
        out[f] = square


@jit(REORDER)
def normalise(first, last, W, norms, tiny):
    """Every row gets unit norm, and norms tell so; rows of zeros stay."""
    for f in range(first, last):
        w, norm = W[f], max(norms[f], tiny)
        for j in range(w.size):
            w[j] /= norm
        norms[f] /= norm


@jit(REORDER)
def through_encoder(W_enc, g_b, grad):
    """grad -= g_b @ W_enc, W_enc by feature."""
    f, F = 0, W_enc.shape[0] // 4 * 4
    while f < F:
        w0, w1, w2, w3 = W_enc[f], W_enc[f + 1], W_enc[f + 2], W_enc[f + 3]
        a0, a1, a2, a3 = g_b[f], g_b[f + 1], g_b[f + 2], g_b[f + 3]
        for j in range(grad.size):
            grad[j] -= a0 * w0[j] + a1 * w1[j] + (a2 * w2[j] + a3 * w3[j])
        f += 4
    while f < W_enc.shape[0]:
        w0, a0 = W_enc[f], g_b[f]
        for j in range(grad.size):
            grad[j] -= a0 * w0[j]
        f += 1


@jit(REORDER)
def row_sums(x, out):
    for j in range(x.shape[0]):
        total = x.dtype.type(0)
        for t in range(x.shape[1]):
            total += x[j, t]
        out[j] = total
