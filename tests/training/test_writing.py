import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxseq as js
from jaxseq.training import writing
from jaxseq.training.errors import UserError
from jaxseq.training.text import Vocabulary


@pytest.mark.parametrize("change", [{"characters": 0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}])
def test_samplings_that_make_no_sense_are_refused(change: dict[str, float]):
    with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')} must be"):
        writing.check(dataclasses.replace(writing.Sampling(), **change))


def test_samples_never_hold_the_unknown_character_and_obey_their_settings():
    vocabulary = Vocabulary("abc")
    cell = js.Stack((js.OneHot(4), js.Elman(4, 8), js.Dense(8, 4)))
    params = cell.init(jax.random.key(0))
    biased = (*params[:-1], js.DenseParams(jnp.zeros((8, 4)), jnp.array([50.0, 0.0, 1.0, 0.5])))

    def write(**settings):
        sampling = writing.Sampling("ab", 60, **settings)
        return writing.write(cell, biased, vocabulary, sampling, jax.random.key(1))

    assert set(write(temperature=3.0)) == set("abc")
    assert len(write()) == 60 and write() == write()
    assert set(write(temperature=0.0)) == set(write(top_k=1)) == set(write(top_p=0.01)) == {"b"}
    assert set(write(temperature=3.0, top_k=2)) == set("bc")
