"""The laws that hold for every layer of the zoo, in values and in gradients.

For each layer one program, `unroll` with its gradients at one shape, is compiled; padding, gaps, resets, length 0 and
concatenation are data for it. `folded` is the reference: it knows `step` and nothing of `unroll`. What goes into the
programs and comes out is made and compared by NumPy, which compiles nothing.
"""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq.core.unroll import unroll_checked
from jaxseq.core.wrapper import layers_within
from tests import zoo

ROWS, TIME = 4, 6
CELLS = [name for name, line in zoo.ZOO.items() if isinstance(line.layer, js.Cell)]
TRAINED = [name for name, line in zoo.ZOO.items() if not line.frozen]
NOISY = [name for name in CELLS if zoo.ZOO[name].noisy]
FULL = np.ones((ROWS, TIME), bool)
GAPS = np.array([[1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
RESETS = np.array([[0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
NEVER = ~FULL
AT_3 = NEVER | (np.arange(TIME) == 3)
FROM_3 = FULL & (np.arange(TIME) >= 3)

pytestmark = pytest.mark.usefixtures("float64")


def own_unroll(layer: js.SequenceLayer) -> bool:
    """Whether it unrolls in a way of its own, and not through layers inside."""
    return type(layer)._unroll is not js.Cell._unroll and len(list(layers_within(layer))) == 1


class Program:
    """A layer with random params, inputs and state, and its one compiled program."""

    def __init__(self, line: zoo.Line):
        layer, random = line.layer, np.random.default_rng(1)
        self.layer = layer
        self.resets = None if line.pairs else RESETS
        self.bare = self.params = numbers(jax.jit(layer.init)(jax.random.key(1)))
        if line.memory is not None:
            self.params = numbers(layer.attach(self.bare, random.normal(size=line.memory)))
        self.xs = zoo.inputs(layer, random, (ROWS, TIME))
        self.initial = numbers(layer.initial_state(self.params, (ROWS,)))
        self.state = jax.tree.map(functools.partial(disturb, random), self.initial)
        self.run = jax.jit(functools.partial(with_gradients, layer.unroll))

    def __call__(self, params=None, xs=None, state=None, mask=FULL, reset=NEVER, **kwargs):
        reset = None if self.resets is None else reset
        params = self.params if params is None else params
        xs = self.xs if xs is None else xs
        state = self.state if state is None else state
        return numbers(self.run(params, xs, state, mask=mask, reset=reset, **kwargs))


def disturb(random, leaf):
    """The array of a state plus normal numbers, if it is of integers 0, 1 or 2."""
    noise = random.normal(size=leaf.shape) if is_real(leaf) else random.integers(0, 3, leaf.shape)
    return leaf + noise.astype(leaf.dtype)


def with_gradients(unroll, params, xs, state, **kwargs):
    """`unroll`'s state and outputs, and the gradients of a fixed weighted sum of both."""

    def loss(params, xs, state):
        out = unroll(params, xs, state, **kwargs)
        floats = filter(is_real, jax.tree.leaves(out))
        return sum((leaf * weights(leaf)).sum() for leaf in floats), out

    gradients, (state, ys) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True)(params, xs, state)
    return {"state": state, "ys": ys, "params": gradients[0], "xs": gradients[1], "initial": gradients[2]}


def weights(leaf):
    return np.cos(1.0 + np.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)


def folded(layer, params, xs, state, mask, reset, key=None, reverse=False):
    """What `unroll` means: `step` over and over, by the scan of JAX."""
    keys = None
    if key is not None:
        draw_key, step_key = jax.random.split(key)
        params = layer.draw(params, draw_key)
        keys = jax.random.split(step_key, TIME)
    start = layer.initial_state(params, (ROWS,))

    def where(rows, a, b):
        return jax.tree.map(lambda a, b: jax.vmap(jnp.where)(rows, a, b), a, b)

    def body(state, step):
        x, mask, reset, key = step
        state = where(reset, start, state)
        after, y = layer.step(params, state, where(mask, x, jax.tree.map(jnp.zeros_like, x)), key)
        return where(mask, after, state), where(mask, y, jax.tree.map(jnp.zeros_like, y))

    first = functools.partial(jax.tree.map, lambda leaf: jnp.moveaxis(leaf, 1, 0))
    state, ys = jax.lax.scan(body, state, (*first((xs, mask, reset)), keys), TIME, reverse=reverse)
    return state, first(ys)


def assert_same(actual, expected, tolerance=1e-10):
    """Two trees of numbers are equal to `tolerance` of the largest absolute value in each array."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        if a.dtype != jax.dtypes.float0 and a.size:
            a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
            assert np.isfinite(e).all()
            np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1.0, np.abs(e).max()))


def numbers(tree):
    """The tree with its arrays as NumPy's; keys stay."""
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else np.asarray(leaf), tree)


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_real(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def is_spec(leaf):
    return isinstance(leaf, jax.sharding.PartitionSpec)


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@functools.lru_cache(maxsize=1)
def program(name: str) -> Program:
    if list(zoo.ZOO).index(name) % 16 == 0:  # a hundred programs are gigabytes; to forget each costs a third more time
        jax.clear_caches()
    return Program(zoo.ZOO[name])


@pytest.mark.parametrize("name", CELLS)
def test_unroll_is_folded_steps(name):
    p = program(name)
    reference = jax.jit(functools.partial(with_gradients, functools.partial(folded, p.layer)))
    assert_same(p(mask=GAPS, reset=RESETS), reference(p.params, p.xs, p.state, mask=GAPS, reset=RESETS))


@pytest.mark.parametrize("name", NOISY)
def test_unroll_with_a_key_is_folded_steps_with_its_keys(name):
    p, key = program(name), jax.random.key(7)
    reference = jax.jit(functools.partial(with_gradients, functools.partial(folded, p.layer)))
    expected = reference(p.params, p.xs, p.state, mask=GAPS, reset=RESETS, key=key)
    assert_same(p(mask=GAPS, reset=RESETS, key=key), expected)
    with pytest.raises(AssertionError):
        assert_same(p(mask=GAPS, reset=RESETS)["ys"], expected["ys"])


@pytest.mark.parametrize("name", zoo.ZOO)
def test_padding_changes_nothing(name):
    """Nor does what it holds: NaN, huge values, tokens out of range. Nor does the state of a row of nothing else."""
    p = program(name)
    clean = p(mask=GAPS, reset=RESETS)

    def spoil(leaf, where, junk):
        leaf = leaf.copy()
        leaf[where] = junk if is_real(leaf) else np.iinfo(leaf.dtype).max
        return leaf

    for junk in (np.nan, 1e300):
        spoilt = jax.tree.map(functools.partial(spoil, where=~GAPS, junk=junk), p.xs)
        assert_same(p(xs=spoilt, mask=GAPS, reset=RESETS), clean)
    empty = ~GAPS.any(axis=1)  # of these rows the state is only handed on
    lost = jax.tree.map(lambda leaf: spoil(leaf, empty, np.nan) if is_real(leaf) else leaf, p.state)
    parts = ("ys", "params", "xs", "initial")
    assert_same(*({part: p(state=state, mask=GAPS)[part] for part in parts} for state in (lost, p.state)))
    kept = np.asarray(p.layer.output_mask(GAPS))
    for leaf in jax.tree.leaves((at(clean["ys"], ~kept), at(clean["xs"], ~GAPS))):
        assert leaf.dtype == jax.dtypes.float0 or not leaf.any()


@pytest.mark.parametrize("name", [name for name, line in zoo.ZOO.items() if not line.pairs])
def test_gaps_are_as_if_the_steps_were_not_there(name):
    p = program(name)
    packed = np.argsort(~GAPS, axis=1, kind="stable")  # the unmasked steps of each row first
    rows = np.arange(ROWS)[:, None]
    gaps, dense = p(mask=GAPS), p(xs=at(p.xs, (rows, packed)), mask=GAPS[rows, packed])
    assert_same(dense["ys"], at(gaps["ys"], (rows, packed)))
    assert_same(dense["state"], gaps["state"])


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_row_of_length_0_returns_its_state(name):
    p = program(name)
    assert_same(at(p(mask=GAPS)["state"], 1), at(p.state, 1))


@pytest.mark.parametrize("name", CELLS)
def test_concatenation(name):
    """unroll(a ++ b) is unroll(b) from the state after a."""
    p = program(name)
    a = p(mask=~FROM_3)
    b, whole = p(mask=FROM_3, state=a["state"]), p()
    assert_same(b["state"], whole["state"])
    assert_same(jax.tree.map(np.add, a["ys"], b["ys"]), whole["ys"])


@pytest.mark.parametrize("name", CELLS)
def test_outputs_do_not_depend_on_the_future(name):
    """d y_t / d x_(t + 1) = 0: other inputs from step 3 on change no output before it, nor have they gradients."""
    p = program(name)
    others = zoo.inputs(p.layer, np.random.default_rng(9), (ROWS, TIME))
    xs = jax.tree.map(lambda a, b: np.concatenate([a[:, :3], b[:, 3:]], axis=1), p.xs, others)
    assert_same(at(p(xs=xs)["ys"], np.s_[:, :3]), at(p()["ys"], np.s_[:, :3]))
    if own_unroll(p.layer):  # elsewhere gradients are those of what gives the values

        @jax.jit
        def early(params, xs, state):
            def unroll(params, xs, state):
                return (), at(p.layer.unroll(params, xs, state)[1], np.s_[:, :3])

            return with_gradients(unroll, params, xs, state)["xs"]

        for leaf in filter(is_real, jax.tree.leaves(early(p.params, p.xs, p.state))):
            assert np.any(leaf[:, :3]) and not np.any(leaf[:, 3:])


@pytest.mark.parametrize("name", CELLS)
def test_reset_is_a_fresh_start(name):
    """After a reset nothing depends on what came before: neither the state that was passed in, nor earlier inputs."""
    p = program(name)
    fresh, reset = p(mask=FROM_3, state=p.initial), p(mask=FROM_3, reset=AT_3)
    assert_same({k: reset[k] for k in ("state", "ys", "xs")}, {k: fresh[k] for k in ("state", "ys", "xs")})
    assert_same(p(reset=AT_3)["state"], fresh["state"])
    lost = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan) if is_real(leaf) else leaf, p.state)
    first = NEVER | (np.arange(TIME) == 0)
    assert_same(p(state=lost, reset=first), p(reset=first))
    masked = p(mask=FROM_3 & ~AT_3, reset=AT_3)
    assert_same(masked["state"], p(mask=FROM_3 & ~AT_3, state=p.initial)["state"])


@pytest.mark.parametrize("name", zoo.ZOO)
def test_gradients_are_finite_at_the_initial_state_and_zero_inputs(name):
    p = program(name)
    out = p(xs=jax.tree.map(np.zeros_like, p.xs), state=p.initial)
    for leaf in jax.tree.leaves(out):
        assert leaf.dtype == jax.dtypes.float0 or np.isfinite(leaf).all()


def direction(tree):
    """Random numbers for the real arrays of a tree, zeros for the others."""
    random = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape) * is_real(leaf), tree)


def moved(tree, along, step):
    return jax.tree.map(lambda leaf, v: (leaf + step * v).astype(leaf.dtype), tree, along)


def slope(out, along):
    """The derivative along a direction, from what `with_gradients` gives."""
    gradients = jax.tree.leaves((out["params"], out["xs"], out["initial"]))
    pairs = zip(gradients, jax.tree.leaves(along), strict=True)
    return sum(((g * v).sum() for g, v in pairs if is_real(g)), start=0.0)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_finite_differences(name):
    p = program(name)
    given = (p.params, p.xs, p.state)
    along = direction(given)

    def value(step):
        out = p(*moved(given, along, step), mask=GAPS, reset=RESETS)
        return sum((leaf * weights(leaf)).sum() for leaf in jax.tree.leaves((out["state"], out["ys"])) if is_real(leaf))

    exact = slope(p(mask=GAPS, reset=RESETS), along)
    assert abs((value(1e-6) - value(-1e-6)) / 2e-6 - exact) <= 1e-7 * max(1.0, abs(exact))


@pytest.mark.parametrize("name", [name for name in TRAINED if own_unroll(zoo.ZOO[name].layer)])
def test_second_derivatives_are_finite_differences(name):
    """Of layers with a way of their own to unroll; those of the engine have their own tests."""
    p = program(name)
    given = (p.params, p.xs, p.state)
    along = direction(given)

    @jax.jit
    @jax.grad
    def curvature(step):
        return slope(with_gradients(p.layer.unroll, *moved(given, along, step), mask=GAPS, reset=RESETS), along)

    def at_step(step):
        return slope(p(*moved(given, along, step), mask=GAPS, reset=RESETS), along)

    exact = curvature(0.0)
    assert abs((at_step(1e-6) - at_step(-1e-6)) / 2e-6 - exact) <= 1e-6 * max(1.0, abs(exact))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_other_ways_to_read_the_same_sequences(name):
    """Reversed, under vmap, with two batch axes, and sharded over the batch: one program more."""
    p = program(name)
    flip = functools.partial(jax.tree.map, functools.partial(jnp.flip, axis=1))

    def backward(params, xs, state, mask, reset):
        options = {"mask": flip(mask), "reset": flip(reset), "reverse": True}
        state, ys = p.layer.unroll(params, flip(xs), state, **options)
        return state, flip(ys)

    def vmapped(params, xs, state, mask, reset):
        def row(xs, state, mask, reset):
            return p.layer.unroll(params, xs, state, mask=mask, reset=reset)

        return jax.vmap(row)(xs, state, mask, reset)

    @jax.jit
    def others(params, xs, state, mask, reset):
        wide = functools.partial(jax.tree.map, lambda leaf: leaf[None])
        return {
            "backward": with_gradients(backward, params, xs, state, mask=mask, reset=reset),
            "vmapped": with_gradients(vmapped, params, xs, state, mask=mask, reset=reset),
            "axes": p.layer.unroll(params, wide(xs), wide(state), mask=mask[None], reset=wide(reset)),
        }

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    out = others(p.params, *jax.device_put((p.xs, p.state, GAPS, p.resets), over_rows))
    expected = p(mask=GAPS, reset=RESETS)
    assert_same(out["backward"], expected)
    assert_same(out["vmapped"], expected)
    assert_same(at(out["axes"], 0), (expected["state"], expected["ys"]))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_no_steps_and_equal_layers(name):
    """A sequence of no steps returns the state and empty outputs; an equal layer traces nothing anew."""
    p = program(name)
    mask = FULL[:, :0]
    state, ys = p.layer.unroll(p.params, at(p.xs, np.s_[:, :0]), p.state, mask=mask)
    assert_same(state, p.state)
    assert_same(ys, jax.tree.map(lambda leaf: leaf[:, :0], p()["ys"]))
    traced = unroll_checked._cache_size()
    for equal in (copy.deepcopy(p.layer), pickle.loads(pickle.dumps(p.layer))):
        assert equal == p.layer and hash(equal) == hash(p.layer) and repr(equal) == repr(p.layer)
        equal.unroll(p.params, at(p.xs, np.s_[:, :0]), p.state, mask=mask)
    assert unroll_checked._cache_size() == traced


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if not name.startswith("own_")])
def test_no_promotion_is_implicit(name):
    p = program(name)
    unroll = functools.partial(p.layer.unroll, mask=GAPS, reset=p.resets, key=jax.random.key(0))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(unroll, p.params, p.xs, p.state)


@pytest.mark.parametrize("name", NOISY)
def test_keys_whose_numbers_change_under_vmap(name):
    p, key = program(name), jax.random.key(7, impl="rbg")
    state, ys = p.layer.unroll(p.params, p.xs, p.state, mask=GAPS, reset=RESETS, key=key)
    assert_same((state, ys), folded(p.layer, p.params, p.xs, p.state, GAPS, RESETS, key=key))


def test_equal_cells_trace_once():
    traces = []

    class Counting(js.Cell):
        size: int

        def init(self, key):
            return jnp.ones(self.size)

        def initial_state(self, params, batch_shape=()):
            return jnp.zeros((*batch_shape, self.size), params.dtype)

        def step(self, params, state, x, key=None):
            traces.append(x)
            return state + jnp.broadcast_to(params, x.shape) * x, state

    xs = jnp.ones((2, 5, 3))
    Counting(3).unroll(jnp.ones(3), xs)
    first = len(traces)
    Counting(3).unroll(jnp.zeros(3), 2 * xs)
    assert first == len(traces) > 0
    Counting(4).unroll(jnp.ones(4), jnp.ones((2, 5, 4)))
    assert len(traces) > first


@pytest.mark.parametrize("name", zoo.ZOO)
def test_json(name):
    layer = zoo.ZOO[name].layer
    own = [thing for thing in vars(zoo).values() if isinstance(thing, type) and issubclass(thing, js.SequenceLayer)]
    read = js.from_json(js.to_json(layer), extra=own)
    assert type(read) is type(layer)
    if not name.endswith("_axis"):  # how a product is computed is not written
        assert read == layer


@pytest.mark.parametrize("name", zoo.ZOO)
def test_abstract_init_and_axes(name):
    p = program(name)
    params = jax.eval_shape(p.layer.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, p.bare)
    assert jax.tree.map(jnp.result_type, params) == jax.tree.map(jnp.result_type, p.bare)
    unread = p.bare if zoo.ZOO[name].memory else p.layer.attach(p.bare, jnp.ones(3))
    for params_again in (unread, p.layer.attach(p.params, None)):
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, params_again, p.bare))
    assert jax.tree.map(jnp.ndim, params) == jax.tree.map(len, p.layer.axes(), is_leaf=is_spec)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_params_inputs_and_state_of_one_dtype_give_that_dtype(name, dtype):
    p = program(name)

    def cast(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, dtype if is_real(leaf) else leaf.dtype)

    given = jax.tree.map(cast, (p.params, p.xs, p.state))
    unroll = functools.partial(p.layer.unroll, key=jax.random.key(0), length=TIME)
    state, ys = jax.eval_shape(unroll, *given)
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, given[2])
    for leaf in filter(is_real, jax.tree.leaves(ys)):
        assert leaf.dtype == dtype or leaf.weak_type


@pytest.mark.parametrize("name", CELLS)
def test_bfloat16_is_float64_rounded(name):
    p, expected = program(name), program(name)(mask=GAPS, reset=RESETS)

    def cast(leaf):
        return leaf.astype(jnp.bfloat16) if is_real(leaf) else leaf

    unroll = jax.jit(p.layer.unroll)
    state, ys = unroll(*jax.tree.map(cast, (p.params, p.xs, p.state)), mask=GAPS, reset=RESETS)
    wide = jax.tree.map(lambda a, e: np.asarray(a, e.dtype), (state, ys), (expected["state"], expected["ys"]))
    assert_same(wide, (expected["state"], expected["ys"]), tolerance=0.1)
