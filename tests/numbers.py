"""Numbers to compare by, and how closely they need to agree."""

import jax
import numpy as np


def random_like(generator, tree):
    """The tree with normal numbers for its arrays."""
    return jax.tree.map(lambda leaf: np.asarray(generator.normal(size=leaf.shape), leaf.dtype), tree)


def random_params(generator, layer):
    """Normal numbers for all params of a layer, also for biases and scales, which start alike."""
    return random_like(generator, jax.eval_shape(layer.init, jax.random.key(0)))


def close(ours, theirs, tolerance=1e-5):
    """Raises unless the arrays of two trees differ by no more than this part of the largest number in each."""

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    jax.tree.map(compare, ours, theirs)
