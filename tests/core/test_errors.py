"""Wrong use fails early, and says what was expected, what came and what to do."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jaxseq as js

LSTM = js.LSTM(input_size=64, hidden_size=128)
ELMAN = js.Elman(input_size=3, hidden_size=4)
EMBED = js.Embed(vocab_size=5, size=3)
LANGUAGE_MODEL = js.Stack((EMBED, js.LSTM(3, 4), js.Dense(4, 5)))


class Repeat(js.Cell):
    """A user's cell without inputs."""

    input_rank = None

    def init(self, key):
        return ()

    def initial_state(self, params, batch_shape=()):
        return jnp.zeros(batch_shape)

    def step(self, params, state, x, key=None):
        return state, state


class Scale(js.Cell):
    """A user's cell, with a field of any type and no declared sizes."""

    factor: Any

    def init(self, key):
        return ()

    def initial_state(self, params, batch_shape=()):
        return ()

    def step(self, params, state, x, key=None):
        return state, self.factor * x


class Doubled(js.Cell):
    """A user's cell that outputs twice as many features as it reads."""

    def init(self, key):
        return ()

    def initial_state(self, params, batch_shape=()):
        return ()

    def step(self, params, state, x, key=None):
        return state, jnp.concatenate([x, x], axis=-1)


class Pair(js.Cell):
    """A user's cell that reads a vector and a token at each step."""

    input_rank = (1, 0)

    def init(self, key):
        return ()

    def initial_state(self, params, batch_shape=()):
        return ()

    def step(self, params, state, x, key=None):
        return state, x


class Pairs(js.Cell):
    """A user's cell that reads two vectors at each step, of which the second might be its output."""

    input_rank = (1, 1)

    def init(self, key):
        return ()

    def initial_state(self, params, batch_shape=()):
        return ()

    def step(self, params, state, x, key=None):
        return state, x[1]


def zeros(cell):
    """Params of zeros."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(cell.init, jax.random.key(0)))


def floats(*shape, dtype=jnp.float32):
    return np.zeros(shape, dtype)


def tokens(*shape):
    return np.zeros(shape, np.int32)


def says(error, message):
    """The error, with `message` somewhere in what it says."""
    return pytest.raises(error, match=re.escape(message))


INPUTS = {
    "features": (
        LSTM,
        floats(2, 7, 32),
        ValueError,
        "LSTM(input_size=64, hidden_size=128) got inputs with 32 features",
    ),
    "features, what to do": (LSTM, floats(2, 7, 32), ValueError, "it needs 64 in the last axis"),
    "features of a GRU": (js.GRU(3, 4), floats(7, 2), ValueError, "GRU(input_size=3, hidden_size=4) got inputs with 2"),
    "features of a GRUv1": (js.GRUv1(3, 4), floats(7, 2), ValueError, "GRUv1(input_size=3, hidden_size=4) got inputs"),
    "features of a Dense": (js.Dense(3, 4), floats(7, 2), ValueError, "Dense(input_size=3, output_size=4) got inputs"),
    "features inside a Stack": (
        js.Stack((js.Map(jnp.tanh), ELMAN)),
        floats(7, 2),
        ValueError,
        "Elman(input_size=3, hidden_size=4) got inputs with 2 features",
    ),
    "rank": (
        ELMAN,
        floats(3),
        ValueError,
        "reads inputs [*batch, time, *features] with features of rank 1, but got float32[3]",
    ),
    "rank of tokens": (EMBED, np.int32(1), ValueError, "features of rank 0, but got int32[]"),
    "an array for a pair": (
        Pair(),
        floats(7, 3),
        ValueError,
        "Pair() reads 2 inputs at each step, of ranks (1, 0), but got one array float32[7,3]: give a tuple of 2 arrays",
    ),
    "an array without the times": (
        js.Stack((js.Clip(js.Phased(LSTM), 1.0),)),
        floats(7, 64),
        ValueError,
        "reads 2 inputs at each step, (x, time), of ranks (1, 1), but got one array",
    ),
    "an array without the outputs": (js.Jordan(2, 3, 4), floats(7, 2), ValueError, "(x, output), of ranks (1, 1), but"),
    "tree": (Pair(), [floats(7, 3)], ValueError, "features of rank (1, 0), but got [float32[7,3]]: another tree"),
    "axes": (Pair(), (floats(2, 7, 3), tokens(2, 6)), ValueError, "[*batch, time] axes differ: [(2, 6), (2, 7)]"),
    "tokens for vectors": (
        ELMAN,
        tokens(7, 3),
        TypeError,
        "reads vectors, but got int32[7,3]: a cell that reads tokens",
    ),
    "none": (ELMAN, None, ValueError, "but got None; a layer without inputs declares input_rank = None"),
    "floats for Embed": (EMBED, floats(2, 7), TypeError, "reads tokens, integers, but got float32[2,7]: cast"),
    "params for inputs": (ELMAN, zeros(ELMAN), ValueError, "but got GatedParams(input_kernel=float32[3,1,4]"),
    "inputs for none": (
        Repeat(),
        floats(2, 7),
        ValueError,
        "Repeat() reads no inputs, but got float32[2,7]: give None",
    ),
    "a tree for a Dense": (
        js.Stack((js.States(ELMAN), js.Dense(4, 2))),
        floats(2, 7, 3),
        ValueError,
        "Dense(input_size=4, output_size=2) got inputs (ElmanState(hidden=float32[2,4]), float32[2,4]), which is no",
    ),
    "floats for OneHot": (js.OneHot(5), floats(2, 7), TypeError, "OneHot(size=5) reads tokens, integers, but got"),
    "dtype": (
        ELMAN,
        floats(7, 3, dtype=jnp.bfloat16),
        TypeError,
        "has params of float32 but got inputs of bfloat16: cast one to the other",
    ),
}


@pytest.mark.parametrize("cell, xs, error, message", INPUTS.values(), ids=INPUTS)
def test_inputs(cell, xs, error, message):
    with says(error, message):
        cell.unroll(zeros(cell), xs)


def test_inputs_of_a_step():
    with says(ValueError, "LSTM(input_size=64, hidden_size=128) got inputs with 32 features"):
        LSTM.step(zeros(LSTM), LSTM.initial_state(zeros(LSTM)), floats(32))
    with says(TypeError, "reads tokens, integers, but got float32[]"):
        EMBED.step(zeros(EMBED), (), np.float32(1))
    with says(TypeError, "has params of float32 but got inputs of bfloat16"):
        ELMAN.step(zeros(ELMAN), ELMAN.initial_state(zeros(ELMAN)), floats(3, dtype=jnp.bfloat16))


XS = floats(2, 7, 3)
GIVEN = {
    "mask shape": ({"mask": np.ones((2, 6), bool)}, ValueError, "got a mask of shape (2, 6)"),
    "mask shape, what to do": ({"mask": np.ones((2, 6), bool)}, ValueError, "need [*batch, time] = (2, 7)"),
    "time-major mask": ({"mask": np.ones((7, 2), bool)}, ValueError, "got a mask of shape (7, 2)"),
    "mask without batch": ({"mask": np.ones(7, bool)}, ValueError, "got a mask of shape (7,)"),
    "mask dtype": ({"mask": np.ones((2, 7))}, TypeError, "needs a boolean mask, got float"),
    "mask dtype, what to do": ({"mask": np.ones((2, 7), int)}, TypeError, "cast it with .astype(bool)"),
    "reset shape": ({"reset": np.ones((2, 7, 1), bool)}, ValueError, "got a reset of shape (2, 7, 1)"),
    "reset dtype": ({"reset": tokens(2, 7)}, TypeError, "needs a boolean reset, got int32"),
    "length": ({"length": 6}, ValueError, "got length=6, but its inputs have 7 steps"),
    "state of another cell": (
        {"state": js.GRUState(floats(2, 4))},
        TypeError,
        "got the state of another cell: GRUState(hidden=float32[2,4]); it needs ElmanState(hidden=float32[2,4])",
    ),
    "state, what to do": ({"state": floats(2, 4)}, TypeError, "as initial_state(params, batch_shape) makes it"),
    "state of another batch": (
        {"state": js.ElmanState(floats(5, 4))},
        ValueError,
        "got a state.hidden of shape (5, 4); these inputs need (2, 4)",
    ),
    "state without batch": ({"state": js.ElmanState(floats(4))}, ValueError, "state.hidden of shape (4,)"),
    "state of another size": ({"state": js.ElmanState(floats(2, 5))}, ValueError, "state.hidden of shape (2, 5)"),
    "state of another dtype": (
        {"state": js.ElmanState(floats(2, 4, dtype=jnp.bfloat16))},
        TypeError,
        "got a state.hidden of bfloat16; with these params it is float32: cast one to the other",
    ),
    "seed": ({"key": 0}, TypeError, "needs one key, such as jax.random.key(0), got 0"),
    "keys": ({"key": np.zeros((3, 2), np.uint32)}, TypeError, "needs one key, such as"),
}


@pytest.mark.parametrize("given, error, message", GIVEN.values(), ids=GIVEN)
def test_what_is_given_beside_the_inputs(given, error, message):
    with pytest.raises(error) as caught:
        ELMAN.unroll(zeros(ELMAN), XS, **given)
    assert str(caught.value).startswith("Elman(input_size=3, hidden_size=4) ")
    assert message in str(caught.value)


def test_masks_may_be_lists():
    mask = [[True] * 5 + [False] * 2] * 2
    assert ELMAN.unroll(zeros(ELMAN), XS, mask=mask, reset=mask)[1].shape == (2, 7, 4)
    with says(TypeError, "needs a boolean mask, got int32[2, 7]: cast it"):
        ELMAN.unroll(zeros(ELMAN), XS, mask=[[1] * 7] * 2)


def test_length_is_needed_where_nothing_tells_it():
    with says(ValueError, "Repeat() got no inputs: say how many steps with length="):
        Repeat().unroll((), None)
    with says(ValueError, "got length=3, but its inputs have 7 steps"):
        Repeat().unroll((), None, mask=np.ones((2, 7), bool), length=3)


OTHER = "got params of another layer: "
PARAMS = {
    "sizes": (ELMAN, js.Elman(5, 4), ValueError, OTHER + "GatedParams(input_kernel=float32[5,1,4]"),
    "more gates": (ELMAN, js.LSTM(3, 4), ValueError, "init(key) makes GatedParams(input_kernel=float32[3,1,4]"),
    "fewer gates": (js.GRU(3, 4), js.MinimalGRU(3, 4), ValueError, OTHER),
    "as many gates": (js.GRU(3, 4), js.GRUv1(3, 4), ValueError, OTHER),
    "peepholes": (js.LSTM(3, 4), js.PeepholeLSTM(3, 4), ValueError, OTHER),
    "outputs": (
        js.Dense(3, 2),
        js.Dense(3, 4),
        ValueError,
        OTHER + "DenseParams(kernel=float32[3,4], bias=float32[4])",
    ),
    "inputs": (js.Dense(3, 2), js.Dense(4, 2), ValueError, OTHER),
    "layers": (js.Stack((ELMAN, js.Dense(4, 2))), js.Stack((ELMAN,)), TypeError, "2 layers needs as many params in a"),
    "no tuple": (js.Stack((ELMAN,)), ELMAN, TypeError, "Stack of 1 layers needs as many params in a tuple, got 3"),
}


@pytest.mark.parametrize("key", [None, np.zeros(2, np.uint32)], ids=["", "key"])
@pytest.mark.parametrize("cell, other, error, message", PARAMS.values(), ids=PARAMS)
def test_params_of_another_cell(cell, other, error, message, key):
    with says(error, message):
        cell.unroll(zeros(other), XS, key=key)


@pytest.mark.parametrize("params", [None, (), (jnp.ones((5, 4)),)])
def test_params_of_another_embedding(params):
    with says(ValueError, "Embed(vocab_size=5, size=3) got params of another layer"):
        EMBED.unroll(params, np.array([[0, 4]]))


@pytest.mark.parametrize("cell", [ELMAN, LSTM, js.GRU(3, 4)])
def test_initial_state_without_params(cell):
    with says(ValueError, "got params of another layer: (int32[],); init(key) makes"):
        cell.initial_state((2,))
    with says(TypeError, "needs a tuple of sizes as batch_shape, such as (2,), got 2"):
        cell.initial_state(zeros(cell), 2)


def test_params_of_two_dtypes():
    params = zeros(ELMAN)
    with says(TypeError, "got params of bfloat16 and float32: cast them to one dtype"):
        ELMAN.unroll(params._replace(bias=params.bias.astype(jnp.bfloat16)), XS)


STEPS = {
    "batch": (
        js.LSTM(3, 4).initial_state(zeros(js.LSTM(3, 4)), (2,)),
        ValueError,
        "got a state.hidden of shape (2, 4)",
    ),
    "cell": (js.GRUState(floats(7, 4)), TypeError, "got the state of another cell"),
    "mask": (
        np.ones((2, 7), bool),
        TypeError,
        "got flags bool[2,7] as the state to start from: give a mask or resets by",
    ),
    "dtype": (
        js.LSTMState(floats(7, 4, dtype=jnp.bfloat16), floats(7, 4)),
        TypeError,
        "got a state.hidden of bfloat16; with these params it is float32",
    ),
}


@pytest.mark.parametrize("state, error, message", STEPS.values(), ids=STEPS)
def test_state_of_a_step(state, error, message):
    cell = js.LSTM(3, 4)
    with says(error, message):
        cell.step(zeros(cell), state, floats(7, 3))


def test_inputs_that_the_cell_does_not_describe():
    with says(ValueError, "with features of rank 0, but got (int32[2], int32[2]): another tree"):
        EMBED.unroll(zeros(EMBED), (jnp.zeros(2, int), jnp.zeros(2, int)))
    with says(TypeError, "Map(function='tanh') does not tell the shape of its inputs"):
        js.Feedback(js.Map("tanh")).unroll((), None, length=3)
    with says(TypeError, "has params of float32 but got inputs of complex64"):
        ELMAN.unroll(zeros(ELMAN), XS.astype(jnp.complex64))


def test_lengths_that_are_no_number_of_steps():
    with says(ValueError, "got length=-1; it needs 0 or more steps"):
        Repeat().unroll((), None, length=-1)
    with says(TypeError, "'float' object cannot be interpreted as an integer"):
        Repeat().unroll((), None, length=2.0)


class Forgetful(js.Cell):
    """A user's cell with a mistake: what `initial_state` and `step` return are fields."""

    start: Any
    returns: Any

    def init(self, key):
        return ()

    def initial_state(self, params, batch_shape=()):
        return self.start(batch_shape)

    def step(self, params, state, x, key=None):
        return self.returns(state, x)


def no_batch(batch_shape):
    return jnp.zeros(3)


def with_batch(batch_shape):
    return jnp.zeros((*batch_shape, 3))


def one_value(state, x):
    return x


def other_dtype(state, x):
    return state.astype(jnp.bfloat16), x


def other_tree(state, x):
    return (state,), x


MISTAKES = {
    "batch": (
        no_batch,
        one_value,
        ValueError,
        "initial_state(params, (2,)) gave an array of shape (3,); it needs",
    ),
    "pair": (with_batch, one_value, TypeError, "step needs to return (state, y), it returned float32[2,3]"),
    "dtype": (with_batch, other_dtype, TypeError, "it was given float32[2,3] and returned bfloat16[2,3]"),
    "tree": (with_batch, other_tree, TypeError, "step needs to keep the tree, shapes and dtypes of the state"),
}


@pytest.mark.parametrize("start, returns, error, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_a_cell_of_ones_own(start, returns, error, message):
    with says(error, message):
        Forgetful(start, returns).unroll((), floats(2, 7, 3))


def test_a_size_that_fails_is_not_taken_for_none():
    class Own(js.Elman):
        @property
        def output_size(self):
            return self.hiden_size

    with says(TypeError, "Own.output_size fails: Own has no hiden_size."):
        js.Stack((Own(3, 4), js.Dense(5, 2)))


def test_methods_take_what_unroll_gives_them():
    with says(TypeError, "Own.step(self, params, state, x) needs to take (self, params: Any, state: Any, x: Any, key:"):

        class Own(js.Elman):
            def step(self, params, state, x):
                return state, x

    with says(TypeError, "Other.initial_state(self, params) needs to take"):

        class Other(js.Elman):
            def initial_state(self, params):
                return ()

    with pytest.raises(TypeError, match="abstract.*initial_state"):

        class Stateful(js.Cell):
            def init(self, key):
                return ()

            def step(self, params, state, x, key=None):
                return state + x, state

        Stateful()


def test_fields_are_checked_where_annotations_are_deferred():
    own = {"__annotations__": {"rate": "float", "count": "int | None"}, "__module__": __name__}
    Own = type(js.Elman)("Own", (js.Dropout,), own)  # noqa: N806
    assert Own(rate=0, count=np.int64(2)) == Own(0.0, 2)
    with says(TypeError, "Own needs an integer count, got 'two'"):
        Own(0.5, "two")


def test_what_unroll_needs_to_know_before_it_is_traced():
    with says(TypeError, "Elman needs a static reverse and length: bind them before jit or vmap"):
        jax.jit(ELMAN.unroll)(zeros(ELMAN), XS, reverse=True)


def test_a_cell_declares_fields_and_has_no_init():
    with says(TypeError, "Own defines __init__: declare its fields (size: int) instead, as a dataclass"):

        class Own(js.Cell):
            def __init__(self, size):
                self.size = size


def test_cells_are_values():
    with says(dataclasses.FrozenInstanceError, "Elman is a value: make another one to change hidden_size"):
        ELMAN.hidden_size = 5
    with says(dataclasses.FrozenInstanceError, "Elman is a value: it keeps hidden_size"):
        del ELMAN.hidden_size

    @dataclasses.dataclass(frozen=True)  # needless, and harmless
    class Own(js.Elman):
        label: str = ""

    assert Own(3, 4, label="a") == Own(3, 4, label="a") != Own(3, 4)
    assert Own(3, 4).init(jax.random.key(0)).bias.shape == (1, 4)
    with pytest.raises(TypeError, match="non-frozen"):
        dataclasses.dataclass(type("Loose", (js.Elman,), {}))


def test_states_of_a_step_of_another_stack():
    with says(TypeError, "Stack of 1 layers needs as many states in a tuple, got 0"):
        js.Stack((ELMAN,)).step((zeros(ELMAN),), (), floats(3))


# Token ids are data, so only checkify can tell: on request, also through a whole model under jit.


@pytest.mark.parametrize("cell", [EMBED, LANGUAGE_MODEL], ids=["alone", "in a model"])
def test_tokens_out_of_range_are_checked_on_request(cell):
    checked = jax.jit(checkify.checkify(cell.unroll, errors=checkify.index_checks))
    error, _ = checked(zeros(cell), np.array([[0, 4]]))
    error.throw()
    for token in (5, -1):
        error, _ = checked(zeros(cell), np.array([[0, token]]))
        with says(checkify.JaxRuntimeError, f"index {token} is out of bounds for axis 0 with size 5"):
            error.throw()


# What is wrong with a cell is said when it is built.


def identity(x):
    return x


SEQUENTIAL = js.Sequential((ELMAN, js.Dense(4, 3)))
BUILT = {
    "size 0": (lambda: js.LSTM(0, 4), ValueError, "LSTM needs input_size >= 1, got 0"),
    "size -1": (lambda: js.GRU(3, -1), ValueError, "GRU needs hidden_size >= 1, got -1"),
    "size 1.5": (lambda: js.Dense(3, 1.5), TypeError, "Dense needs an integer output_size, got 1.5"),
    "size True": (lambda: js.OneHot(True), TypeError, "OneHot needs a number size, got True"),
    "rank": (
        lambda: js.Map("tanh", input_rank="x"),
        ValueError,
        "Map needs a rank, or a tuple of ranks, as input_rank",
    ),
    "size '3'": (lambda: js.Embed("3", 3), TypeError, "Embed needs an integer vocab_size, got '3'"),
    "size None": (lambda: js.OneHot(None), TypeError, "OneHot needs an integer size, got None"),
    "size of a projection": (
        lambda: js.ProjectedLSTM(3, 4, projection_size=0),
        ValueError,
        "ProjectedLSTM needs projection_size >= 1, got 0",
    ),
    "activation": (
        lambda: js.Elman(3, 4, activation="tan"),
        ValueError,
        "No activation is called 'tan'; there are",
    ),
    "activation, what to do": (lambda: js.Map("tan"), ValueError, "or give a function"),
    "gate activation": (lambda: js.GRU(3, 4, gate_activation="logistic"), ValueError, "called 'logistic'"),
    "peepholes": (
        lambda: js.PeepholeLSTM(3, 4, output_gate_sees="old"),
        ValueError,
        'output_gate_sees is "new" or "previous", got \'old\'',
    ),
    "gate layout": (lambda: js.LSTM(3, 4, gate_layout="rows"), ValueError, "gate_layout is"),
    "no layers": (lambda: js.Stack(()), TypeError, "Stack needs a tuple of at least one layer, got ()"),
    "one layer": (lambda: js.Stack(ELMAN), TypeError, "Stack needs a tuple of at least one layer, got Elman"),
    "a function": (lambda: js.Stack((ELMAN, identity)), TypeError, "Map(function) makes one of a function"),
    "a class": (lambda: js.Stack((ELMAN, js.Dense)), TypeError, "Dense'>: call it with its sizes"),
    "a layer": (lambda: js.Stack((SEQUENTIAL,)), TypeError, "(number 0) reads whole sequences: use Sequential"),
    "chain": (
        lambda: js.Stack((ELMAN, js.Dropout(0.1), js.Dense(3, 5))),
        ValueError,
        "Stack: Dense(input_size=3, output_size=5) (number 2) needs 3 features, but it is given 4",
    ),
    "chain after a first cell of one size": (
        lambda: js.Stack((js.LRU(2, 4), js.LRU(4, 4))),
        ValueError,
        "Stack: LRU(input_size=4, hidden_size=4) (number 1) needs 4 features, but it is given 2",
    ),
    "tokens": (lambda: js.Stack((ELMAN, EMBED)), ValueError, "(number 1) reads tokens, but it is given 4 features"),
    "sum": (lambda: js.Residual(ELMAN), ValueError, "Residual adds input to output, but Elman(input_size=3, hidden_"),
    "steps of a layer": (
        lambda: js.Remat(SEQUENTIAL),
        TypeError,
        "has no step: it reads whole sequences",
    ),
    "no cell": (lambda: js.Remat(identity), TypeError, "Remat needs a cell, but <function identity"),
    "every 0": (lambda: js.Remat(ELMAN, every=0), ValueError, "Remat needs every >= 1 step, or None, got 0"),
    "every 1.5": (lambda: js.Remat(ELMAN, every=1.5), TypeError, "Remat needs an integer every, got 1.5"),
    "rate 1": (lambda: js.Dropout(1), ValueError, "Dropout needs 0 <= rate < 1, got 1"),
    "rate -0.1": (lambda: js.Dropout(-0.1), ValueError, "Dropout needs 0 <= rate < 1, got -0.1"),
    "rate '0.5'": (lambda: js.Dropout("0.5"), TypeError, "Dropout needs a number rate, got '0.5'"),
    "rate nan": (lambda: js.Dropout(float("nan")), ValueError, "Dropout needs a number rate, got nan"),
}


@pytest.mark.parametrize("build, error, message", BUILT.values(), ids=BUILT)
def test_building(build, error, message):
    with says(error, message):
        build()


def test_outputs_that_cannot_be_fed_back():
    cell = js.Feedback(js.Stack((js.Dense(2, 3), Doubled())))
    with says(ValueError, "cannot feed back its output float32["):
        cell.unroll(zeros(cell), None, length=3)
    with says(ValueError, "Feedback gives Dense(input_size=2, output_size=3) its output of 3 features, but it reads 2"):
        js.Feedback(js.Dense(2, 3))
    pair = js.Feedback(Pairs())
    with says(TypeError, "Pairs() does not tell the shape of its inputs"):
        pair.unroll((), floats(2, 7, 3))


@pytest.mark.parametrize("cell", [ELMAN, EMBED, js.Dense(2, 3), LANGUAGE_MODEL])
def test_params_are_made_from_a_key(cell):
    with says(TypeError, "needs one key, such as jax.random.key(0), got 0"):
        cell.init(0)


def test_outputs_that_cannot_be_added():
    with says(ValueError, "Residual(cell=Doubled()) cannot add its input float32[3] to the output float32[6]"):
        js.Residual(Doubled()).step((), (), floats(3))
    with says(ValueError, "cannot add its input"):
        js.Residual(Doubled()).unroll((), XS)


def test_layer_of_whole_sequences_has_no_step():
    with says(AttributeError, "Sequential has no step: it reads the whole sequence; a Stack of cells steps"):
        SEQUENTIAL.step  # noqa: B018
    assert not hasattr(SEQUENTIAL, "step")
    with says(AttributeError, "Elman has no apply: unroll(params, xs) reads a sequence"):
        ELMAN.apply  # noqa: B018


def test_fields_that_are_not_plain_data():
    for factor in (np.ones(3), jnp.ones(3), {"a": 1}):
        with says(TypeError, "Scale cannot be hashed, so it cannot be compiled: its fields must be plain data"):
            Scale(factor).unroll((), XS)
        with says(TypeError, f"but factor holds {factor!r}"):
            Scale((1.0, [2.0, factor]))


def test_unroll_is_final():
    with says(TypeError, "Fast overrides unroll, which is final: override _unroll to be faster"):

        class Fast(js.Cell):
            def unroll(self, params, xs):
                return xs


def test_lengths_are_integers():
    with says(TypeError, "length_mask needs integer lengths, got float32"):
        js.length_mask(floats(2), 7)


def test_messages_name_a_layer_of_many_parts_by_its_beginning():
    model = js.Stack((js.Embed(65, 64), *[js.LSTM(64, 64)] * 8, js.Dense(64, 65)))
    with pytest.raises(TypeError) as caught:
        model.unroll(model.init(jax.random.key(0)), tokens(2, 7), state=np.ones(3, bool))
    begin, _, rest = str(caught.value).partition("...")
    assert repr(model).startswith(begin) and len(begin) < 100 and rest.startswith(" got flags bool[3]")
    assert f"{LSTM}" == "LSTM(input_size=64, hidden_size=128)" and str(model) == repr(model) == f"{model!r}"
