"""Arbitrary shapes, views, options and list lengths against the reference."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedstep as fs
from fusedstep import reference

# In units in the last place of the largest term; the tight bounds are in test_oracle.py.
ULP = 8
DTYPES = [
    dtype
    for dtype in (np.float32, np.float64)
    if np.finfo(reference.wide_dtype(dtype)).eps < np.finfo(dtype).eps
]

numbers = st.just(0.0) | st.floats(1e-6, 1)
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple) | st.tuples(st.integers(200, 600))
common = {
    "lr": numbers,
    "weight_decay": numbers,
    "maximize": st.booleans(),
    "grad_scale": st.floats(1e-3, 1e3),
}
betas = st.just(0.0) | st.floats(1e-6, 0.9999)
gd_options = st.fixed_dictionaries(common)
momentum_options = st.fixed_dictionaries(
    {**common, "momentum": st.floats(1e-3, 1), "dampening": numbers}
) | st.fixed_dictionaries({**common, "momentum": st.floats(1e-3, 1), "nesterov": st.just(True)})
adam_options = st.fixed_dictionaries(
    {
        **common,
        "betas": st.tuples(betas, betas),
        "eps": st.floats(1e-10, 1),
        "bias_correction": st.booleans(),
    }
)


@st.composite
def views(draw, shape, dtype):
    """Draw a view of `shape` of a larger array, and return the view and that array."""
    axes = draw(st.permutations(range(len(shape))))
    slices, lengths = [], []
    for axis in axes:
        step = draw(st.sampled_from([1, 1, 2, 3]))
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        end = before + shape[axis] * step
        slices.append((slice(before, end, step), draw(st.sampled_from([1, 1, -1]))))
        lengths.append(end + after)
    parent = np.full(lengths, 7, dtype)
    view = parent[(*(part for part, _ in slices), ...)]
    view = view[(*(slice(None, None, sign) for _, sign in slices), ...)]
    view = view.transpose(np.argsort(axes))
    assert view.shape == shape
    return view, parent


@st.composite
def tensors(draw, count):
    """Draw the arrays of one parameter, each in a layout of its own."""
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pairs = [draw(views(shape, dtype)) for _ in range(count)]
    for k, (view, _) in enumerate(pairs):
        values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 2, shape)
        view[...] = abs(values) if k >= 3 else values
    return pairs


def check(rule, reference_rule, count, data, options):
    """Step a list of arrays (or one alone) and compare each with its reference."""
    length = data.draw(st.integers(0, 4), label="list length")
    drawn = [data.draw(tensors(count), label="arrays") for _ in range(length)]
    sign = -1 if options["maximize"] else 1
    for (p, _), (g, _), *_ in drawn:
        # Nothing cancels in g + weight_decay * p, whose error the largest term would not show.
        g[...] = sign * np.copysign(g, p)
    before = [[view.copy() for view, _ in pairs] for pairs in drawn]
    gaps = [[with_zeros(*pair) for pair in pairs] for pairs in drawn]
    steps = data.draw(st.lists(st.integers(1, 10**6), min_size=length, max_size=length))

    if length == 1 and data.draw(st.booleans(), label="alone"):
        rule(*(view for view, _ in drawn[0]), step=steps[0], **options)
    else:
        streams = [[pairs[k][0] for pairs in drawn] for k in range(count)]
        rule(*streams, step=steps, **options)

    for pairs, old, step in zip(drawn, before, steps, strict=True):
        exact = reference_rule(*old, step=step, **options)
        scale = reference_rule(
            *map(abs, old), step=step, **{**options, "maximize": False, "lr": -options["lr"]}
        )
        written = [view for k, (view, _) in enumerate(pairs) if k != 1]
        for result, wanted, largest in zip(written, exact, scale, strict=False):
            error = reference.ulp_error(*map(np.atleast_1d, (result, wanted, largest)))
            assert (error <= ULP).all()
        assert pairs[1][0].tobytes() == old[1].tobytes()
    for pairs, old in zip(drawn, gaps, strict=True):
        assert [with_zeros(*pair) for pair in pairs] == old


def with_zeros(view, parent):
    """Return the bytes of the array that `view` looks at, with zeros in the view's place."""
    values = view.copy()
    view[...] = 0
    outside = parent.tobytes()
    view[...] = values
    return outside


quick = settings(deadline=None, max_examples=150)


@quick
@given(data=st.data(), options=gd_options)
def test_gd(data, options):
    check(fs.gd_step, lambda p, g, **o: reference.gd(p, g, **o)[:1], 2, data, options)


@quick
@given(data=st.data(), options=momentum_options)
def test_momentum(data, options):
    def step(p, g, buffer, **options):
        fs.gd_step(p, g, momentum_buffer=buffer, **options)

    check(step, reference.gd, 3, data, options)


@quick
@given(data=st.data(), options=adam_options)
def test_adam(data, options):
    check(fs.adam_step, reference.adam, 4, data, options)


@quick
@given(data=st.data(), options=adam_options)
def test_adamw(data, options):
    def exact(*arrays, **options):
        return reference.adam(*arrays, decoupled=True, **options)

    check(fs.adamw_step, exact, 4, data, options)


@quick
@given(data=st.data(), options=adam_options)
def test_amsgrad(data, options):
    def step(p, g, m, v, vmax, **options):
        fs.adam_step(p, g, m, v, max_exp_avg_sq=vmax, **options)

    check(step, reference.adam, 5, data, options)
