"""The compiled loops of the dense step, between its matrix products (see `chatsae.sae.kernels` for the letters).

Everything lies by feature or by dimension: hidden_pre and feature_acts are [F, N], inputs and outputs [D, N]. Their
rows may have more than n elements; only n count.
"""

from chatsae.sae.kernels import REORDER, jit


@jit(False)
def subtract(n, xT, b_dec, really, inputs):
    """What goes to the encoder [D, n]: x, less b_dec if `really`."""
    for j in range(xT.shape[0]):
        row, to, less = xT[j], inputs[j], b_dec[j] if really else xT.dtype.type(0)
        for t in range(n):
            to[t] = row[t] - less


@jit(REORDER)
def relu(first, last, n, z, b_enc, fired, acts_sum):
    """z becomes relu(z + b_enc), NaN where it is NaN. Adds to fired[f] the tokens on which f is active, to acts_sum[f]
    its activations."""
    one, zero = z.dtype.type(1), z.dtype.type(0)
    for f in range(first, last):
        row, b, total, active_on = z[f, :n], b_enc[f], zero, zero  # counted in floats, as wide as the rest
        for t in range(row.size):
            value = row[t] + b
            inactive = value <= zero
            value = zero if inactive else value
            active_on += zero if inactive else one
            row[t] = value
            total += value
        fired[f] += active_on
        acts_sum[f] += total


@jit(False)
def jump(first, last, n, z, b_enc, low, theta, acts, fired, near):
    """z becomes z + b_enc, acts what of it exceeds theta; adds to near[f] the tokens on which it exceeds low."""
    for f in range(first, last):
        row, out, b, active_on, near_on, zero = z[f, :n], acts[f], b_enc[f], 0, 0, z.dtype.type(0)
        for t in range(row.size):
            value = row[t] + b
            active = not (value <= theta[f])
            row[t] = value
            out[t] = value if active else zero
            active_on += active
            near_on += not (value <= low[f])
        fired[f] += active_on
        near[f] += near_on


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
def relu_back(first, last, n, acts, d_acts, l1, norms, weighted, along, g_b):
    """d_acts becomes d loss / d hidden_pre, summed into g_b; the penalty of a feature is l1 (sum of its acts), times
    the norm of its decoder row w if `weighted`. along[f] grows by the sum of acts d_acts (see `finish`)."""
    for f in range(first, last):
        row, back, add, zero = acts[f, :n], d_acts[f], l1 * norms[f] if weighted else l1, acts.dtype.type(0)
        total = dot = zero
        for t in range(row.size):
            dot += row[t] * back[t]
            value = back[t] + add if row[t] > zero else zero
            back[t] = value
            total += value
        g_b[f] += total
        along[f] += dot


@jit(REORDER)
def jump_back(first, last, n, z, d_acts, theta, bandwidth, half, l0, g_b, g_theta):
    """d_acts becomes d loss / d hidden_pre, summed into g_b; g_theta: through the straight-through estimators."""
    for f in range(first, last):
        row, back, bound, zero = z[f, :n], d_acts[f], theta[f], z.dtype.type(0)
        total = pull = zero
        for t in range(row.size):
            d, value = back[t], row[t]
            pull += (bound * d + l0) / bandwidth if abs((value - bound) / bandwidth) < half else zero
            value = d if value > bound else zero
            back[t] = value
            total += value
        g_b[f] += total
        g_theta[f] -= pull


@jit(REORDER)
def finish(first, last, acts_sum, along, l1, norms, weighted, g_dec, g_enc, pulls, penalties, squares):
    """The penalty of each feature, what its decoder row w adds of itself to its gradient (pulls[f] w, where the penalty
    is `weighted` with the norm of w), and the squared norm of the gradients of both rows.

    The product of pulls[f] w with the gradient of w is that with the sum of acts d_out, which is the sum of acts
    d_acts: `along`.
    """
    for f in range(first, last):
        pull, square, penalty = l1 * acts_sum[f], g_dec.dtype.type(0), l1 * acts_sum[f]
        pulls[f] = square
        if weighted:
            penalty *= norms[f]
            if norms[f] > 0:
                pulls[f] = pull / norms[f]
                square = pull * pull + (pulls[f] + pulls[f]) * along[f]
        penalties[f] = penalty
        dec, enc = g_dec[f], g_enc[f]
        for j in range(dec.size):
            square += dec[j] * dec[j] + enc[j] * enc[j]
        squares[f] = square


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
def row_sums(n, x, out):
    """Adds to out the sums of the rows."""
    for j in range(x.shape[0]):
        row = x[j, :n]
        total = x.dtype.type(0)
        for t in range(row.size):
            total += row[t]
        out[j] += total
