"""What the kernels are made of: scans of affine maps in either direction, numerics, sums and stores.

Interpreted (TRITON_INTERPRET=1), some things go another way, because Triton's interpreter does them very slowly or wrongly:
`inline`, `count`, `unrolled`, `scan_states`, `scan_adjoint`, `settled`, `step_of`, `total` and `rounded`.
`tests/ops/test_triton.py` compares the scans and `rounded` with what they stand for.
"""

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)


def inline(function):
    """A function that kernels call. Interpreted, it stays plain Python: at every call of a jitted function the interpreter
    patches the whole language anew, which takes longer than the arithmetic."""
    return function if INTERPRETED else triton.jit(function)


# -- scans -------------------------------------------------------------------------------------------------------------


@triton.jit
def compose(a1, w1, a2, w2):
    """First h -> a1 h + w1, then h -> a2 h + w2; section 3 of SCAN.md."""
    return a1 * a2, a2 * w1 + w2


@triton.jit
def compose_adjoint(p1, q1, a1, p2, q2, a2):
    """The same for the adjoint, whose result is wanted *before* the last factor is applied.

    An element (p, q, a) takes the mu that arrives at its first step to lam = p mu + q at its last one, which hands on a lam.
    So lam needs no neighbour's factor, and mu is never divided by a to get it back."""
    factor = p2 * a1
    return factor * p1, factor * q1 + q2, a2


if INTERPRETED:

    def scan_states(a, w, REVERSE):
        return _scan((a, w), compose.fn, REVERSE)[1]

    def scan_adjoint(q, a, REVERSE):
        return _scan((tl.full(a.shape, 1.0, a.dtype), q, a), compose_adjoint.fn, REVERSE)[1]

    def _scan(elements, combine, reverse):
        """What tl.associative_scan along axis 1 returns. The interpreter's own calls `combine` once per number; here it is
        called once per step, on the arrays behind the tensors."""
        results = tuple(t * 1 for t in elements)
        steps = [[t.handle.data[:, step] for t in elements] for step in range(elements[0].shape[1])]
        last = None
        for step in reversed(range(len(steps))) if reverse else range(len(steps)):
            last = steps[step] if last is None else combine(*last, *steps[step])
            for result, value in zip(results, last, strict=True):
                result.handle.data[:, step] = value
        return results

    def count(end):
        """range(end). The interpreter's own asks numpy for something that numpy 2.4 no longer does."""
        i = 0
        while end > i:
            yield i
            i += 1

    unrolled = range

    def settled(x):
        return x

    def step_of(x, index, which):
        return total(tl.where(index == which, x, 0.0), 1)[:, None]

    def total(x, axis):
        return tl.reduce(x, axis, tl.standard._sum_combine)

    def rounded(x, dtype):
        """`x` in `dtype`, to nearest even. The interpreter cuts float32 off to bfloat16."""
        if dtype != tl.bfloat16:
            return x.to(dtype)
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)

else:

    @triton.jit
    def turned(x):
        """The tile with its columns in opposite order: one shuffle per number. tl.associative_scan's own reverse=True and
        tl.flip take five."""
        last: tl.constexpr = x.shape[1] - 1
        return tl.gather(x, tl.broadcast_to(last - tl.arange(0, x.shape[1])[None, :], x.shape), 1)

    @triton.jit
    def settled(x):
        """The same tile in the thread layout of `turned`, one warp to a row. What comes from a product of matrices or was
        turned from (height, columns) has another layout, which would spread over the arithmetic and meet this one often."""
        return tl.gather(x, tl.broadcast_to(tl.arange(0, x.shape[1])[None, :], x.shape), 1)

    @triton.jit
    def scan_states(a, w, REVERSE: tl.constexpr):
        """h with h_l = a_l h_prev + w_l along axis 1, from a state of zero; equation (4)."""
        if REVERSE:
            _, h = tl.associative_scan((turned(a), turned(w)), 1, compose)
            h = turned(h)
        else:
            _, h = tl.associative_scan((a, w), 1, compose)
        return h

    @triton.jit
    def scan_adjoint(q, a, REVERSE: tl.constexpr):
        """lam with lam_l = mu_l + q_l, where mu_l = a lam of the step before in this walk, from a mu of zero; section 2."""
        one = tl.full(a.shape, 1.0, a.dtype)
        if REVERSE:
            _, lam, _ = tl.associative_scan((one, turned(q), turned(a)), 1, compose_adjoint)
            lam = turned(lam)
        else:
            _, lam, _ = tl.associative_scan((one, q, a), 1, compose_adjoint)
        return lam

    @triton.jit
    def step_of(x, index, which: tl.constexpr):
        """Column `which` of a tile, (rows, 1): a shuffle in place of a sum."""
        return tl.gather(x, tl.full((x.shape[0], 1), which, tl.int32), 1)

    count = tl.range
    unrolled = tl.static_range

    @triton.jit
    def total(x, axis: tl.constexpr):
        return tl.sum(x, axis)

    @triton.jit
    def rounded(x, dtype: tl.constexpr):
        return x.to(dtype)


# -- numerics, section 5 of SCAN.md ------------------------------------------------------------------------------------


LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@inline
def exp(x):
    """exp(x). Through exp2 it is two instructions on a GPU where tl.exp takes six, which keep what is below 1e-38."""
    return tl.exp2(x * LOG2_E)


@inline
def exp_near_zero(x, ACCURATE: tl.constexpr):
    """exp(x), in float32 with ACCURATE to the last bit near 0, where a state with gain 1/(1-a) would multiply the error."""
    a = exp(x)
    if ACCURATE:
        q = x * 0.008310842327773571 + 0.04178725183010101
        q = q * x + 0.1666693091392517
        q = q * x + 0.49999767541885376
        q = q * x + 0.9999999403953552
        a = tl.where(tl.abs(x) < 0.25, q * x + 1.0, a)
    return a


@inline
def softplus_and_sigmoid(v):
    """softplus(v) = max(v, 0) + log1p(exp(-|v|)) and its derivative, for every v without overflow."""
    z = exp(-tl.abs(v))
    if v.dtype == tl.float64:
        one_more = z + 1.0
        rest = tl.where(one_more == 1.0, 1.0, one_more - 1.0)
        log1p = tl.where(one_more == 1.0, z, tl.log(one_more) * (z / rest))  # Kahan's form
    else:
        p = z * -0.0032440233044326305 + 0.019851453602313995
        p = p * z - 0.05695951730012894
        p = p * z + 0.10603653639554977
        p = p * z - 0.15305592119693756
        p = p * z + 0.1967593878507614
        p = p * z - 0.24954134225845337
        p = p * z + 0.3332996368408203
        p = p * z - 0.4999990165233612
        p = p * z + 1.0
        log1p = p * z
    return tl.maximum(v, 0.0) + log1p, tl.where(v >= 0.0, 1.0, z) / (z + 1.0)


@inline
def sigmoid(v):
    z = exp(-tl.abs(v))
    return tl.where(v >= 0.0, 1.0, z) / (z + 1.0)


# -- columns of a small tile held in registers -------------------------------------------------------------------------


@inline
def column(tile, index, which):
    """Column `which` of a (rows, columns) tile as (rows, 1); `index` is the (1, columns) range."""
    if tile.shape[1] == 1:
        return tile
    else:
        return total(tl.where(index == which, tile, 0.0), 1)[:, None]


@inline
def with_column(tile, index, which, value):
    """The tile with (rows, 1) `value` as its column `which`."""
    if tile.shape[1] == 1:
        return value
    else:
        return tl.where(index == which, value, tile)
