"""Triton kernels of lines 3 and 6, launched by triton.py.

A vector of n coordinates is cut into tiles of BLOCK, aligned in memory; a program processes one. A
layer may begin inside a tile: tile i meets the layers first[i] to last[i], and has a slot of its
own for each, i + layer. The slots of a layer are contiguous, and none is shared. Sums are taken
slot by slot, then over the slots of a layer in one order: the same bits in every run, which
atomics would not give.

S configurations of M workers each may be one block: u (S, n) and z (K, n), K = S M, where worker k
belongs to configuration k // M. A run alone has S = 1.

`numbers` (S, 8) has the hyperparameters of each on the device, as float64:
    0 scale^2   1 radius   2 eps of the dtype   3 t_u   4 sigma   5 sigma / lam   6 kappa   7 nu

w = u - z_k throughout. KIND is a profile's `kernel` (profiles.py), LINE a line of Algorithm 1.
"""

# Triton parses these functions and takes annotations other than constexpr for types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
# ruff: noqa: N803

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def _cos(s):
    """Cosine on [0, pi / 2), relatively accurate up to the pole of tan; anything beyond.

    In float32 without the reduction of large arguments, which costs more than the memory: Cephes'
    polynomials of cos s up to pi / 4, of sin(pi / 2 - s) above, exact but for the tail of pi / 2.
    """
    if s.dtype == tl.float64:
        cos = tl.cos(s)
    else:
        y = (1.57079637050628662 - s) - 4.37113900018624283e-8
        x2, y2 = s * s, y * y
        near0 = 1.0 + x2 * (
            -0.5
            + x2 * (4.166664568298827e-2 + x2 * (-1.388731625493765e-3 + x2 * 2.443315711809948e-5))
        )
        near1 = y * (1.0 + y2 * (-1.6666654611e-1 + y2 * (8.3321608736e-3 + y2 * -1.9515295891e-4)))
        cos = tl.where(s < 0.7853981633974483, near0, near1)
    return cos


@triton.jit
def _factor(s, numbers, KIND: tl.constexpr):
    """2 psi'(s) scale^2, the force over w; nan outside the domain."""
    scale2 = tl.load(numbers).to(s.dtype)
    if KIND == "cube":
        factor = 3.0 * tl.sqrt(s) * scale2
    elif KIND == "tan":
        cos = _cos(s)
        factor = tl.where(s < 1.5707963267948966, 2.0 / (cos * cos) * scale2, float("nan"))
    elif KIND == "log":
        factor = tl.where(s < 1.0, 2.0 / (1.0 - s) * scale2, float("nan"))
    else:
        tl.static_assert(KIND == "quad")
        factor = 0.0 * s + 2.0 * scale2
    return factor


@triton.jit
def _load(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _factor_of_tile(
    w, at, row, first, last, starts, numbers, KIND: tl.constexpr, SEPARABLE: tl.constexpr,
):  # fmt: skip
    """The force over w of each coordinate; if radial, the entry of `row` (L,) of its layer."""
    scale2 = tl.load(numbers).to(w.dtype)
    if SEPARABLE:
        factor = _factor(scale2 * w * w, numbers, KIND)
    elif KIND == "quad":
        factor = 2.0 * scale2
    else:
        factor = tl.zeros_like(w)
        for layer in range(tl.load(first), tl.load(last) + 1):
            own = tl.load(row + layer).to(w.dtype)
            factor = tl.where(at >= tl.load(starts + layer), own, factor)
    return factor


@triton.jit
def _velocity(v, delta, z, numbers):
    """Line 6: kappa v - sigma (delta + nu z)."""
    sigma, kappa = tl.load(numbers + 4).to(z.dtype), tl.load(numbers + 6).to(z.dtype)
    nu = tl.load(numbers + 7).to(z.dtype)
    return kappa * v - sigma * (delta + nu * z)


@triton.jit
def _safe_radius(size_of_u, numbers):
    """`Potential._safe_radius`: the radius less what the rounding of u - z may hide."""
    radius = tl.load(numbers + 1).to(size_of_u.dtype)
    eps = tl.load(numbers + 2).to(size_of_u.dtype)
    return tl.maximum(radius - eps * (32.0 * radius + 4.0 * size_of_u), 0.0)


@triton.jit
def _halving_below(t):
    """The largest of 1, 1/2, 1/4, ... strictly below t >= 0; 0 for t = 0 and below 2^-1022."""
    bits = t.to(tl.int64, bitcast=True)
    power = bits >> 52  # of the largest power of two that is not above t
    power -= tl.where((bits & 0xFFFFFFFFFFFFF) == 0, 1, 0)
    s = (tl.maximum(power, 0) << 52).to(tl.float64, bitcast=True)
    return tl.where(t > 1.0, 1.0, s)


@triton.jit
def sums(
    slots, u, z, v, direction, first, last, starts, numbers, n, M, slots_of_one,
    LINE: tl.constexpr, KIND: tl.constexpr, SEPARABLE: tl.constexpr, COUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Inner products and exits for the forces and the line search, tile by tile. Grid (tiles, K).

    LINE 1: the norms alone; reads u, z_k. LINE 3: reads u, z_k and the total force `direction`
    (S, n). LINE 6: reads u, z_k, v_k and the gradient `direction` (K, n).

    Radial: <w,w>, and for a line search <w,x>, <x,x>, <u,u>, with x the force or the new velocity,
    to slots (K, 1 or 4, slots_of_one). Separable: the steps at which the coordinates leave the
    domain, to slots (K, slots_of_one).
    """
    tile, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    s = k // M
    numbers += s * 8
    center = _load(u + s * n + at, inside)
    own = _load(z + k * n + at, inside)
    w = center - own
    x = w
    if LINE == 3:
        x = _load(direction + s * n + at, inside)
    elif LINE == 6:
        old, delta = _load(v + k * n + at, inside), _load(direction + k * n + at, inside)
        x = _velocity(old, delta, own, numbers)
    if SEPARABLE:
        scale2 = tl.load(numbers).to(w.dtype)
        scale = tl.sqrt(scale2)
        if LINE == 3:
            d = -tl.load(numbers + 3).to(w.dtype) * x
        else:
            d = x
            if COUPLED:
                pull = tl.load(numbers + 5).to(w.dtype)
                d += pull * _factor(scale2 * w * w, numbers, KIND) * w
            d = -d  # z moves by d, so w moves by -d
        radius = _safe_radius(scale * tl.abs(center), numbers)
        towards = tl.where(d > 0, w, -w) * scale
        t = (radius - towards) / (scale * tl.abs(d))
        t = tl.where(d == 0, float("inf"), tl.where(t > 0, t, 0.0))
        tl.store(slots + k * slots_of_one + tile, tl.min(tl.where(inside, t, float("inf"))))
    else:
        quantities: tl.constexpr = 1 if LINE == 1 else 4
        for layer in range(tl.load(first + tile), tl.load(last + tile) + 1):
            here = (at >= tl.load(starts + layer)) & (at < tl.load(starts + layer + 1))
            slot = slots + k * quantities * slots_of_one + tile + layer
            tl.store(slot, tl.sum(tl.where(here, w * w, 0.0)))
            if LINE != 1:
                tl.store(slot + slots_of_one, tl.sum(tl.where(here, w * x, 0.0)))
                tl.store(slot + 2 * slots_of_one, tl.sum(tl.where(here, x * x, 0.0)))
                tl.store(slot + 3 * slots_of_one, tl.sum(tl.where(here, center * center, 0.0)))


@triton.jit
def _total(slots, begin, end, WIDTH: tl.constexpr):
    total = tl.zeros((WIDTH,), tl.float64)
    for i in range(begin, end, WIDTH):
        at = i + tl.arange(0, WIDTH)
        total += _load(slots + at, at < end).to(tl.float64)
    return tl.sum(total)


@triton.jit
def finish(
    factors, exits, slots, spans, numbers, L, M, slots_of_one, LINE: tl.constexpr,
    KIND: tl.constexpr, SEPARABLE: tl.constexpr, BOUNDED: tl.constexpr, COUPLED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """From the slots of a layer to its factor (K, L) and to where it leaves the domain (K, L).

    Grid (L, K), L = 1 if separable. `spans` (L + 1, 2): the slots of each layer, begin and end.
    """
    layer, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, end = tl.load(spans + 2 * layer), tl.load(spans + 2 * layer + 1)
    numbers += (k // M) * 8
    if SEPARABLE:
        least = tl.full((WIDTH,), float("inf"), tl.float64)
        for i in range(begin, end, WIDTH):
            at = i + tl.arange(0, WIDTH)
            t = tl.load(slots + k * slots_of_one + at, mask=at < end, other=float("inf"))
            least = tl.minimum(least, t.to(tl.float64))
        tl.store(exits + k * L + layer, tl.min(least))
    else:
        scale2 = tl.load(numbers)
        row = slots + k * (1 if LINE == 1 else 4) * slots_of_one
        ww = _total(row, begin, end, WIDTH)
        factor = _factor(scale2 * ww, numbers, KIND)
        if LINE != 3:
            tl.store(factors + k * L + layer, factor)
        if LINE != 1 and BOUNDED:
            wx = _total(row + slots_of_one, begin, end, WIDTH)
            xx = _total(row + 2 * slots_of_one, begin, end, WIDTH)
            uu = _total(row + 3 * slots_of_one, begin, end, WIDTH)
            radius = _safe_radius(tl.sqrt(scale2 * uu), numbers)
            limit = radius * radius
            if LINE == 3:  # d = -t_u x
                t_u = tl.load(numbers + 3)
                wd, dd = -t_u * wx, t_u * t_u * xx
            else:  # w moves by d = -(x + c w)
                c = 0.0 * ww
                if COUPLED:
                    c += tl.load(numbers + 5) * factor
                wd = -(wx + c * ww)
                dd = xx + 2.0 * c * wx + c * c * ww
                # The terms that cancel were summed in the dtype of the vectors.
                lengths = tl.sqrt(xx) + tl.abs(c) * tl.sqrt(ww)
                limit -= 16.0 * tl.load(numbers + 2) * scale2 * lengths * lengths
            a, b, c0 = scale2 * dd, scale2 * wd, scale2 * ww - limit
            root = tl.sqrt(tl.maximum(b * b - a * c0, 0.0))
            t = tl.where(b > 0, -c0 / (b + root), (root - b) / a)
            t = tl.where(a > 0, t, float("inf"))
            # c0 < 0 inside. Past the boundary, and for what is not a number, there is no step.
            tl.store(exits + k * L + layer, tl.where((c0 < 0) & (t > 0), t, 0.0))


@triton.jit
def steps(own, smallest, cuts, exits, M, L, LINE: tl.constexpr, WIDTH: tl.constexpr):
    """From the exits (K, L) to the steps of the line search: s_k (K,) and the smallest (S,).

    Grid (S,). LINE 6 also counts the cuts (K,); in line 3 the ranks agree first.
    """
    dtype: tl.constexpr = smallest.dtype.element_ty
    s0 = tl.program_id(0).to(tl.int64) * M
    own += s0
    cuts += s0
    exits += s0 * L
    least = tl.full((), 1.0, tl.float64)
    for k in range(M):
        t = tl.full((WIDTH,), float("inf"), tl.float64)
        for i in range(0, L, WIDTH):
            at = i + tl.arange(0, WIDTH)
            t = tl.minimum(t, tl.load(exits + k * L + at, mask=at < L, other=float("inf")))
        s = _halving_below(tl.min(t))
        least = tl.minimum(least, s)
        if LINE == 6:
            tl.store(own + k, s.to(dtype))
            tl.store(cuts + k, tl.load(cuts + k) + (s < 1.0).to(tl.int64))
    tl.store(smallest + tl.program_id(0), least.to(dtype))


@triton.jit
def forces(
    out, u, z, factors, first, last, starts, numbers, n, M, L, KIND: tl.constexpr,
    SEPARABLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Line 3: sum_k grad phi(w_k) to out (S, n). Grid (tiles, S). Reads u and the z_k."""
    tile, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    numbers += s * 8
    factors += s * M * L
    center = _load(u + s * n + at, inside)
    total = tl.zeros_like(center)
    row = z + s * M * n
    for k in range(M):
        w = center - _load(row + at, inside)
        total += w * _factor_of_tile(
            w, at, factors + k * L, first + tile, last + tile, starts, numbers, KIND, SEPARABLE
        )
        row += n
    tl.store(out + s * n + at, total, mask=inside)


@triton.jit
def move_u(u, force, step, cuts, numbers, n, BOUNDED: tl.constexpr, BLOCK: tl.constexpr):
    """Line 3: u -= s t_u force. Grid (tiles, S). Reads u and the force, writes u."""
    dtype: tl.constexpr = u.dtype.element_ty
    tile, which = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    t = tl.load(numbers + which * 8 + 3).to(dtype)
    if BOUNDED:
        s = tl.load(step + which)
        t *= s
        if tile == 0:
            tl.store(cuts + which, tl.load(cuts + which) + (s < 1.0).to(tl.int64))
    at += which * n
    tl.store(u + at, _load(u + at, inside) - t * _load(force + at, inside), mask=inside)


@triton.jit
def move_z(
    z, v, u, delta, factors, own_steps, first, last, starts, numbers, n, M, L, KIND: tl.constexpr,
    SEPARABLE: tl.constexpr, BOUNDED: tl.constexpr, COUPLED: tl.constexpr, THROUGH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Line 6 to z_k and v_k. Grid (tiles, K). THROUGH: the coupling passes through the velocity."""
    tile, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    numbers += (k // M) * 8
    row = k * n + at
    own = _load(z + row, inside)
    new = _velocity(_load(v + row, inside), _load(delta + row, inside), own, numbers)
    d = new
    if COUPLED:
        w = _load(u + (k // M) * n + at, inside) - own
        factor = _factor_of_tile(
            w, at, factors + k * L, first + tile, last + tile, starts, numbers, KIND, SEPARABLE
        )
        d += tl.load(numbers + 5).to(w.dtype) * factor * w
    if THROUGH:
        new = d
    if BOUNDED:
        s = tl.load(own_steps + k)
        d *= s
        new *= s
    tl.store(z + row, own + d, mask=inside)
    tl.store(v + row, new, mask=inside)
