"""The papers' algorithms in float64 NumPy, and what Keras does around an optimizer's step.

Written from the papers and from Keras's documentation, sharing no code with the package:

    adamw    Loshchilov and Hutter, 2019, algorithm 2 (amsgrad: Reddi et al., 2018)
    qhadam   Ma and Yarats, 2019, equations 16 to 18; qhadamw adds AdamW's decay
    lamb     You et al., 2020, algorithm 2

And stochastic rounding from its definition: to one of the two neighbours, to the upper one with a probability
that is the distance from the lower one.
"""

import numpy as np


def adamw(w, g, t, slots, lr, decay, *, beta_1, beta_2, epsilon, amsgrad=False):
    m = slots["m"] = beta_1 * slots.get("m", 0.0) + (1 - beta_1) * g
    v = slots["v"] = beta_2 * slots.get("v", 0.0) + (1 - beta_2) * g**2
    if amsgrad:
        v = slots["vhat"] = np.maximum(slots.get("vhat", 0.0), v)
    m_hat = m / (1 - beta_1**t)
    v_hat = v / (1 - beta_2**t)
    return w - decay * w - lr * m_hat / (np.sqrt(v_hat) + epsilon)


def qhadam(w, g, t, slots, lr, decay, *, beta_1, beta_2, nu_1, nu_2, epsilon):
    slots["m"] = beta_1 * slots.get("m", 0.0) + (1 - beta_1) * g
    slots["v"] = beta_2 * slots.get("v", 0.0) + (1 - beta_2) * g**2
    m_hat = slots["m"] / (1 - beta_1**t)
    v_hat = slots["v"] / (1 - beta_2**t)
    top = (1 - nu_1) * g + nu_1 * m_hat
    bottom = np.sqrt((1 - nu_2) * g**2 + nu_2 * v_hat) + epsilon
    return w - decay * w - lr * top / bottom


def lamb(
    w, g, t, slots, lr, decay, *, beta_1, beta_2, epsilon, adapted=True, bias_correction=True,
    grad_averaging=True, trust_ratio_min=None, trust_ratio_max=None,
):  # fmt: skip
    m = slots["m"] = beta_1 * slots.get("m", 0.0) + ((1 - beta_1) if grad_averaging else 1) * g
    v = slots["v"] = beta_2 * slots.get("v", 0.0) + (1 - beta_2) * g**2
    if bias_correction:
        m, v = m / (1 - beta_1**t), v / (1 - beta_2**t)
    u = m / (np.sqrt(v) + epsilon) + decay * w
    ratio = 1.0
    if adapted:
        w_norm, u_norm = np.sqrt(np.sum(w**2)), np.sqrt(np.sum(u**2))
        if w_norm > 0 and u_norm > 0:
            ratio = w_norm / u_norm
        if trust_ratio_min is not None:
            ratio = np.maximum(ratio, trust_ratio_min)
        if trust_ratio_max is not None:
            ratio = np.minimum(ratio, trust_ratio_max)
    return w - lr * ratio * u


def clip(grads, clipnorm=None, clipvalue=None, global_clipnorm=None):
    if clipvalue:
        return [np.clip(g, -clipvalue, clipvalue) for g in grads]
    if clipnorm:
        return [g * np.minimum(1.0, clipnorm / np.sqrt(np.sum(g**2))) for g in grads]
    if global_clipnorm:
        norm = np.sqrt(sum(np.sum(g**2) for g in grads))
        return [g * np.minimum(1.0, global_clipnorm / norm) for g in grads]
    return grads


def train(
    rule, inits, grads, rates, *, weight_decay=0.0, decay_mode="learning_rate", peak=None, decayed=None,
    adapted=None, clipping=None, accumulate=1, ema_momentum=None, ema_overwrite=None, **terms,
):  # fmt: skip
    """Weights after each step: grads and rates one entry a step, decayed and adapted one a variable."""
    weights = [np.array(w, np.float64) for w in inits]
    slots = [{} for _ in weights]
    decayed = decayed or [True] * len(weights)
    averages = [np.zeros_like(w) for w in weights]
    waiting = [np.zeros_like(w) for w in weights]
    history = []
    for step, (step_grads, lr) in enumerate(zip(grads, rates, strict=True)):
        update = step // accumulate
        waiting = [a + np.asarray(g, np.float64) for a, g in zip(waiting, step_grads, strict=True)]
        if (step + 1) % accumulate == 0:
            mean = clip([a / accumulate for a in waiting], **(clipping or {}))
            waiting = [np.zeros_like(w) for w in weights]
            for i, g in enumerate(mean):
                factor = {"learning_rate": lr, "independent": 1.0, "schedule": lr / (peak or 1.0)}
                decay = weight_decay * (1.0 if rule is lamb else factor[decay_mode]) * decayed[i]
                own = dict(terms) if adapted is None else terms | {"adapted": adapted[i]}
                weights[i] = rule(weights[i], g, update + 1, slots[i], lr, decay, **own)
        if ema_momentum is not None:
            keep = ema_momentum if update > 0 else 0.0
            averages = [keep * a + (1 - keep) * w for a, w in zip(averages, weights, strict=True)]
            if ema_overwrite and (update + 1) % ema_overwrite == 0:
                weights = [a.copy() for a in averages]
        history.append([w.copy() for w in weights])
    return history


# Bits of the significand, least exponent of a normal number, largest number.
HALF_TYPES = {"float16": (11, -14, 65504.0), "bfloat16": (8, -126, 2.0**127 * (2 - 2.0**-7))}


def mixed(x):
    """A hash of 32 bits, https://github.com/skeeto/hash-prospector."""
    x = np.asarray(x, np.uint64) & 0xFFFFFFFF
    x = (x ^ (x >> np.uint64(16))) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> np.uint64(15))) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ (x >> np.uint64(15))


def rounding_key(seed, iterations):
    return int(mixed(seed + int(mixed(iterations))))


def rounded_at_random(x, dtype, key, stream, elements):
    """float32 values rounded to a half type; elements: their indices in variable number `stream`."""
    bits, least, largest = HALF_TYPES[dtype]
    x = np.asarray(x, np.float64)
    finite, x = np.isfinite(x), np.where(np.isfinite(x), x, np.copysign(2 * largest, x))
    with np.errstate(divide="ignore"):
        exponents = np.maximum(np.floor(np.log2(np.abs(x))), least)
    spacing = 2.0 ** (exponents - bits + 1)
    below = np.floor(np.abs(x) / spacing)
    stream_key = mixed(key + stream * 0x9E3779B9)
    random = mixed(stream_key + np.asarray(elements, np.uint64)) % 2 ** (24 - bits) / 2 ** (24 - bits)
    rounded = (below + (np.abs(x) / spacing - below + random >= 1)) * spacing
    return np.sign(x) * np.where(finite & (rounded <= largest), rounded, np.inf)
