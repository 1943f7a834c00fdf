"""The kernels of one pass as Triton compiles them. It reads annotations its own way, so only constants have one."""

import triton
import triton.language as tl

# ---------------------------------------------------------------------- rows
#
# Addresses: w, gradient, buffers (adam: m, v, amsgrad's maximum; sgd: b), anchor, count, lr, t, size. All but the first
# two may be 0: no such buffer, an anchor of 0, or a number that the host knows. `count` is what the device itself moves
# on: adam's count of steps, a float32, or sgd's response to a constant gradient, a float64; `t` is the count of steps
# where the host keeps it. Numbers: `AdamNumbers` and `SGDNumbers`, then what the preparation fills in.

ADAM_ADDRESSES, SGD_ADDRESSES = tl.constexpr(10), tl.constexpr(8)
ADAM_NUMBERS, SGD_NUMBERS = tl.constexpr(19), tl.constexpr(13)


@triton.jit
def _one_less_power(base, count):
    """1 − baseᵗ by repeated squaring: no term is negative, so nothing cancels, where 1 − pow(base, t) does."""
    total, factor = base * 0, 1 - base
    # Float32 counts no further, and by then the power is 0.
    left = tl.minimum(count, 16777215.0).to(tl.int32)
    for _ in range(24):
        total = tl.where(left % 2 == 1, total + factor * (1 - total), total)
        factor = factor * (2 - factor)
        left = left // 2
    return total


@triton.jit(do_not_specialize=["rows"])  # else some numbers of tensors are kernels of their own
def prepare_adam(addresses, numbers, rows, found_inf, LANES: tl.constexpr):
    """Counts the step, and fills in what all weights of a tensor share; in float64, which costs few lanes nothing."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = lane < rows
    a, c = addresses + lane * ADAM_ADDRESSES, numbers + lane * ADAM_NUMBERS
    counter = tl.load(a + 6, real, 0)
    here = counter != 0
    place = counter.to(tl.pointer_type(tl.float32))
    count = tl.load(place, here, 0.0) + 1
    if found_inf is not None:
        counter = tl.where(tl.load(found_inf) > 0, 0, counter)
    tl.store(place, count, counter != 0)
    t = tl.where(here, count.to(tl.float64), tl.load(a + 8, real, 1).to(tl.float64))

    address = tl.load(a + 7, real, 0)
    lr = tl.load(address.to(tl.pointer_type(tl.float32)), address != 0, 0.0).to(tl.float64)
    lr = tl.where(address != 0, lr, tl.load(c + 1, real, 0.0))
    decay, decoupled = tl.load(c + 2, real, 0.0), tl.load(c + 3, real, 0.0) != 0
    bias = _one_less_power(tl.load(c + 5, real, 0.0), t)
    # Where the device counts, nobody follows the mean of a constant 1: it counts as built up under a constant β₁.
    response = tl.where(here, lr, lr * (tl.load(c, real, 0.0) / bias))
    tl.store(c + 11, lr / bias, real)
    tl.store(c + 12, tl.where(decoupled, 1 - lr * decay, 1.0), real)
    tl.store(c + 13, tl.where(decoupled, 0.0, decay), real)
    tl.store(c + 14, tl.sqrt(_one_less_power(tl.load(c + 6, real, 0.0), t)), real)
    tl.store(c + 15, response * tl.load(c + 9, real, 0.0), real)
    tl.store(c + 16, response * tl.load(c + 10, real, 0.0), real)


@triton.jit(do_not_specialize=["rows"])
def prepare_sgd(addresses, numbers, rows, found_inf, LANES: tl.constexpr):
    """Takes the response to a constant gradient one step on, and fills in what all weights of a tensor share."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = lane < rows
    a, c = addresses + lane * SGD_ADDRESSES, numbers + lane * SGD_NUMBERS
    counter = tl.load(a + 4, real, 0)
    here = counter != 0
    place = counter.to(tl.pointer_type(tl.float64))
    built = tl.load(c + 4, real, 0.0) * tl.load(place, here, 0.0) + tl.load(c + 5, real, 0.0)
    if found_inf is not None:
        counter = tl.where(tl.load(found_inf) > 0, 0, counter)
    tl.store(place, built, counter != 0)
    ahead = tl.load(c + 6, real, 0.0)
    unit = tl.where(here, tl.where(ahead != 0, 1 + ahead * built, built), tl.load(c, real, 0.0))

    address = tl.load(a + 5, real, 0)
    lr = tl.load(address.to(tl.pointer_type(tl.float32)), address != 0, 0.0).to(tl.float64)
    lr = tl.where(address != 0, lr, tl.load(c + 1, real, 0.0))
    tl.store(c + 1, lr, real)
    tl.store(c + 10, lr * unit * tl.load(c + 8, real, 0.0), real)
    tl.store(c + 11, lr * unit * tl.load(c + 9, real, 0.0), real)


# ---------------------------------------------------------------------- weights


@triton.jit
def _root(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def _over(x, y):
    """x/y rounded once: Triton's own division of float32 is off by two roundings."""
    return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y


@triton.jit
def _at(address, first, REAL: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(REAL))
    if ALIGNED:  # what the compiler must know to load four numbers at a time
        pointer = tl.multiple_of(pointer, 16)
    return pointer + first


@triton.jit
def _shrunk(moved, anchor, anchored, t1, t2):
    """The prox of t₁|w − w₀| + ½t₂(w − w₀)²: exactly w₀ where |w − w₀| ≤ t₁, +0.0 for 0, and NaN where it is NaN."""
    away = tl.where(anchored, moved - anchor, moved)
    below = tl.where(away > t1, t1, away)
    within = tl.where(below < -t1, -t1, below)
    kept = _over(away - within, 1 + t2)
    from_anchor = tl.where(kept == 0, anchor, moved - (away - kept))
    return tl.where(anchored, from_anchor, kept)


@triton.jit
def _gradient(pointer, inside, grad_scale, WORK: tl.constexpr):
    """The gradient, which a GradScaler may have left scaled: unscaled where it lies, as by torch's fused steps."""
    gradient = tl.load(pointer, inside, 0.0)
    if grad_scale is not None:
        gradient = _over(gradient.to(WORK), tl.load(grad_scale).to(WORK)).to(gradient.dtype)
        tl.store(pointer, gradient, inside)
    return gradient.to(WORK)


@triton.jit
def adam_block(
    a,
    c,
    first,
    left,
    grad_scale,
    REAL: tl.constexpr,
    WORK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    inside = at < left
    w_at = _at(tl.load(a), first, REAL, ALIGNED) + at
    mean_at = _at(tl.load(a + 2), first, REAL, ALIGNED) + at
    square_at = _at(tl.load(a + 3), first, REAL, ALIGNED) + at
    largest, anchor = tl.load(a + 4), tl.load(a + 5)
    largest_at = _at(largest, first, REAL, ALIGNED) + at
    has_largest, anchored = at < tl.where(largest != 0, left, 0), anchor != 0

    decay, sign = tl.load(c + 13).to(WORK), tl.load(c + 4).to(WORK)
    beta1, beta2 = tl.load(c + 5), tl.load(c + 6)
    gradient = sign * _gradient(_at(tl.load(a + 1), first, REAL, ALIGNED) + at, inside, grad_scale, WORK)
    w = tl.load(w_at, inside, 0.0).to(WORK)
    mean = tl.load(mean_at, inside, 0.0).to(WORK)
    square = tl.load(square_at, inside, 0.0).to(WORK)
    before = tl.load(largest_at, has_largest, 0.0).to(WORK)
    center = tl.load(_at(anchor, first, REAL, ALIGNED) + at, at < tl.where(anchored, left, 0), 0.0).to(WORK)

    gradient = tl.where(decay != 0, gradient + decay * w, gradient)
    change = gradient - mean
    m = tl.where(beta1 > 0.5, mean + (1 - beta1).to(WORK) * change, gradient - beta1.to(WORK) * change)  # torch's lerp
    v = beta2.to(WORK) * square + (1 - beta2).to(WORK) * gradient * gradient
    top = tl.where(before > v, before, v)
    inverse = _over(1.0, _root(top) * (1 / tl.load(c + 14)).to(WORK) + tl.load(c + 7).to(WORK))
    moved = tl.load(c + 12).to(WORK) * w - tl.load(c + 11).to(WORK) * m * inverse
    t1, t2 = tl.load(c + 15).to(WORK) * inverse, (2 * tl.load(c + 16)).to(WORK) * inverse
    tl.store(w_at, _shrunk(moved, center, anchored, t1, t2).to(REAL), inside)
    tl.store(mean_at, m.to(REAL), inside)
    tl.store(square_at, v.to(REAL), inside)
    tl.store(largest_at, top.to(REAL), has_largest)


@triton.jit
def sgd_block(
    a,
    c,
    first,
    left,
    grad_scale,
    REAL: tl.constexpr,
    WORK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    inside = at < left
    w_at = _at(tl.load(a), first, REAL, ALIGNED) + at
    buffer, anchor = tl.load(a + 2), tl.load(a + 3)
    buffer_at = _at(buffer, first, REAL, ALIGNED) + at
    has_buffer, anchored = at < tl.where(buffer != 0, left, 0), anchor != 0

    decay, sign = tl.load(c + 2).to(WORK), tl.load(c + 3).to(WORK)
    gradient = sign * _gradient(_at(tl.load(a + 1), first, REAL, ALIGNED) + at, inside, grad_scale, WORK)
    w = tl.load(w_at, inside, 0.0).to(WORK)
    old = tl.load(buffer_at, has_buffer, 0.0).to(WORK)
    center = tl.load(_at(anchor, first, REAL, ALIGNED) + at, at < tl.where(anchored, left, 0), 0.0).to(WORK)

    gradient = tl.where(decay != 0, gradient + decay * w, gradient)
    b = tl.where(buffer != 0, tl.load(c + 4).to(WORK) * old + tl.load(c + 5).to(WORK) * gradient, gradient)
    ahead = tl.load(c + 6).to(WORK)
    moved = w - tl.load(c + 1).to(WORK) * tl.where(ahead != 0, gradient + ahead * b, b)
    t1, t2 = tl.load(c + 10).to(WORK), (2 * tl.load(c + 11)).to(WORK)
    tl.store(w_at, _shrunk(moved, center, anchored, t1, t2).to(REAL), inside)
    tl.store(buffer_at, b.to(REAL), has_buffer)


@triton.jit
def step(
    addresses,
    numbers,
    blocks,
    found_inf,
    grad_scale,
    OF_BLOCK: tl.constexpr,
    ADDRESSES: tl.constexpr,
    NUMBERS: tl.constexpr,
    REAL: tl.constexpr,
    WORK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one weight, `OF_BLOCK` its optimizer's; nothing where the GradScaler skips the step."""
    if found_inf is not None:  # noqa: SIM102  this is decided when it is compiled, the next line when it runs
        if tl.load(found_inf) > 0:
            return
    block = tl.load(blocks + tl.program_id(0))
    row, first = block >> 32, (block & 0xFFFFFFFF) * BLOCK
    a, c = addresses + row * ADDRESSES, numbers + row * NUMBERS
    left = tl.load(a + ADDRESSES - 1) - first
    if left >= BLOCK:  # full: no mask keeps the compiler from loading four numbers at a time
        OF_BLOCK(a, c, first, BLOCK, grad_scale, REAL, WORK, ALIGNED, BLOCK)
    else:
        OF_BLOCK(a, c, first, left, grad_scale, REAL, WORK, ALIGNED, BLOCK)


# ---------------------------------------------------------------------- penalties
#
# Addresses: w, gradient (0 where none is asked for), anchor (0 for 0), size. Numbers: λ₁, λ₂.

VALUE, GRADIENT = tl.constexpr(0), tl.constexpr(1)
"""Tasks, as `soft.py` numbers them; any other is both, with the gradient added to what is there."""


@triton.jit
def _soft_block(
    a,
    l1,
    l2,
    slope,
    first,
    left,
    sum_at,
    TASK: tl.constexpr,
    REAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    inside = at < left
    w = tl.load(_at(tl.load(a), first, REAL, ALIGNED) + at, inside, 0.0)
    anchor = tl.load(a + 2)
    away = w - tl.load(_at(anchor, first, REAL, ALIGNED) + at, at < tl.where(anchor != 0, left, 0), 0.0)
    if TASK != VALUE:
        gradient_at = _at(tl.load(a + 1), first, REAL, ALIGNED) + at
        sign = tl.where(away > 0, 1.0, tl.where(away < 0, -1.0, 0.0)).to(REAL)
        gradient = slope * l1.to(REAL) * sign
        gradient = tl.where(l2 != 0, gradient + slope * l2.to(REAL) * (2 * away), gradient)
        if TASK != GRADIENT:
            gradient += tl.load(gradient_at, inside, 0.0)
        tl.store(gradient_at, gradient, inside)
    if TASK != GRADIENT:
        squares = tl.where(l2 != 0, tl.sum(away * away).to(tl.float64), 0.0)
        tl.store(sum_at, l1 * tl.sum(tl.abs(away)).to(tl.float64) + l2 * squares)


@triton.jit
def soft(
    addresses,
    numbers,
    blocks,
    slope,
    sums,
    TASK: tl.constexpr,
    REAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """λ₁Σ|w − w₀| + λ₂Σ(w − w₀)² of one block into its own sum, slope times its gradient, or both.

    A block is summed as a tree, so float32 is off by a few roundings; the sums are float64, and added up elsewhere: no
    two programs write to one place, and every run gives the same bits.
    """
    program = tl.program_id(0)
    block = tl.load(blocks + program)
    row, first = block >> 32, (block & 0xFFFFFFFF) * BLOCK
    a = addresses + row * 4
    l1, l2 = tl.load(numbers + row * 2), tl.load(numbers + row * 2 + 1)
    steep = tl.load(slope)
    left = tl.load(a + 3) - first
    if left >= BLOCK:
        _soft_block(a, l1, l2, steep, first, BLOCK, sums + program, TASK, REAL, ALIGNED, BLOCK)
    else:
        _soft_block(a, l1, l2, steep, first, left, sums + program, TASK, REAL, ALIGNED, BLOCK)
