"""The compiled sums between the parts of a step (see `chatsae.sae.kernels` for the letters)."""

from chatsae.sae.kernels import REORDER, jit


@jit(REORDER)
def weighted_rows(first, last, W, rows, weights, out):
    """out[part] = sum of weights[f] W[f] over a part of the rows: what b_dec gets through the encoder."""
    for part in range(first, last):
        total = out[part]
        total[:] = 0
        for r in range(part * rows.size // out.shape[0], (part + 1) * rows.size // out.shape[0]):
            w, c = W[rows[r]], weights[rows[r]]
            for j in range(total.size):
                total[j] += c * w[j]


@jit(REORDER)
def b_dec_grad(d_out, less, grad):
    """The sum of d_out over tokens, less that of the parts."""
    grad[:] = 0
    for t in range(d_out.shape[0]):
        for j in range(grad.size):
            grad[j] += d_out[t, j]
    for part in range(less.shape[0]):
        for j in range(grad.size):
            grad[j] -= less[part, j]


@jit(REORDER)
def squared_norm(vectors):
    """That of vectors of different lengths, together."""
    square = 0.0
    for g in vectors:
        for j in range(g.size):
            square += g[j] * g[j]
    return square


@jit(False)
def count(firings, firing_counts, steps_since_fired):
    """What a training remembers of who fired."""
    for f in range(firings.size):
        firing_counts[f] += firings[f]
        steps_since_fired[f] = 0 if firings[f] > 0 else steps_since_fired[f] + 1


@jit(False)
def subtract(x, b_dec, out):
    for t in range(x.shape[0]):
        row, to = x[t], out[t]
        for j in range(row.size):
            to[j] = row[j] - b_dec[j]


@jit(False)
def total(values):
    """The sum in float64, in four parts."""
    a = b = c = d = 0.0
    n = values.size // 4 * 4
    for i in range(0, n, 4):
        a += values[i]
        b += values[i + 1]
        c += values[i + 2]
        d += values[i + 3]
    for i in range(n, values.size):
        a += values[i]
    return (a + b) + (c + d)
