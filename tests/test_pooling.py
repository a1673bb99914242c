"""Pooling over time against loops in NumPy over the unmasked steps of each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
POOLS = {
    js.pooling.last: lambda steps: steps[-1],
    js.pooling.mean: lambda steps: steps.mean(axis=0),
    js.pooling.max: lambda steps: steps.max(axis=0),
}
YS = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32) - 2  # mostly negative: a max of 0 is wrong


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("features", [(), (3,), (3, 1, 1)])
def test_pooling_is_over_the_unmasked_steps(pool, features):
    ys = YS.reshape(4, 5, 3, 1, 1)[..., 0, 0, 0] if features == () else YS.reshape(4, 5, *features)
    expected = [
        POOLS[pool](row[keep]) if keep.any() else np.zeros(features) for row, keep in zip(ys, MASK, strict=True)
    ]
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        pooled = pool(ys, MASK)
        np.testing.assert_allclose(pooled, np.stack(expected), rtol=1e-6)
        np.testing.assert_allclose(pool(ys, rank=len(features)), [POOLS[pool](row) for row in ys], rtol=1e-6)
    np.testing.assert_array_equal(jax.vmap(pool)(ys, jnp.asarray(MASK)), pooled)
    np.testing.assert_array_equal(pool(ys[None], MASK[None])[0], pooled)


@pytest.mark.parametrize("pool", POOLS)
def test_what_padding_holds_reaches_neither_value_nor_gradient(pool):
    def loss(ys):
        return jnp.sum(jnp.cos(pool(ys, MASK)))

    clean = np.where(MASK[..., None], YS, 0)
    expected = jax.value_and_grad(loss)(clean)
    for junk in (np.nan, np.inf, 1e30):
        value, gradient = jax.value_and_grad(loss)(np.where(MASK[..., None], YS, junk))
        assert value == expected[0]
        np.testing.assert_array_equal(gradient, expected[1])
    assert not np.asarray(expected[1])[~MASK].any() and np.asarray(expected[1])[MASK].any()


@pytest.mark.parametrize("pool", POOLS)
def test_no_steps_give_zeros(pool):
    assert pool(jnp.ones((2, 0, 3))).tolist() == np.zeros((2, 3)).tolist()
    assert pool(jnp.ones((0, 3)), jnp.ones(0, bool)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("pool", POOLS)
def test_trees_and_dtypes(pool):
    tree = {"a": jnp.asarray(YS, jnp.bfloat16), "b": (jnp.asarray(YS[..., :1]),)}
    pooled = pool(tree, MASK)
    assert jax.tree.map(jnp.shape, pooled) == {"a": (4, 3), "b": ((4, 1),)}
    assert pooled["a"].dtype == jnp.bfloat16 and pooled["b"][0].dtype == jnp.float32
    assert pool(jnp.ones((1, 1000, 1), jnp.bfloat16)) == 1


def test_tokens_are_pooled_as_integers():
    tokens = jnp.array([[-3, -7, 5]])
    assert js.pooling.last(tokens, rank=0).tolist() == [5]
    largest = js.pooling.max(tokens, jnp.array([[True, True, False]]))
    assert largest.tolist() == [-3] and largest.dtype == tokens.dtype
    assert js.pooling.max(tokens > 0, rank=0).tolist() == [True]
    with pytest.raises(TypeError, match="mean needs floating outputs"):
        js.pooling.mean(tokens, rank=0)


def test_last_is_the_state_that_a_cell_ends_with():
    cell = js.Elman(3, 4)
    state, ys = cell.unroll(cell.init(jax.random.key(0)), YS, mask=MASK)
    np.testing.assert_array_equal(js.pooling.last(ys, MASK), state.hidden)


@pytest.mark.parametrize("pool", POOLS)
def test_a_tree_of_ranks(pool):
    images = YS.reshape(4, 5, 3, 1, 1)
    pooled = pool({"image": images, "vector": YS}, rank={"image": 3, "vector": 1})
    assert jax.tree.map(jnp.shape, pooled) == {"image": (4, 3, 1, 1), "vector": (4, 3)}
    np.testing.assert_array_equal(pooled["image"][..., 0, 0], pooled["vector"])


def test_errors_say_which_axes_belong_together():
    with pytest.raises(ValueError, match=r"mean cannot tell the time axis of float32\[4,5,3,1,1\]: give a mask"):
        js.pooling.mean(YS.reshape(4, 5, 3, 1, 1))
    with pytest.raises(ValueError, match=r"mask of shape \(4, 5\)"):
        js.pooling.last(YS, MASK, rank=2)
    with pytest.raises(ValueError, match=r"mask of shape \(4, 5\); these inputs need \[\*batch, time\] = \(3,\)"):
        js.pooling.last(jnp.ones(3), MASK)
    with pytest.raises(ValueError, match=r"with 1 more axes \(rank=1\), got float32\[3\]"):
        js.pooling.last(jnp.ones(3))
    with pytest.raises(ValueError, match=r"mask of shape \(5, 4\)"):
        js.pooling.mean(YS, MASK.T)
    with pytest.raises(TypeError, match="boolean mask"):
        js.pooling.max(YS, jnp.array([1, 2, 3, 4]))
