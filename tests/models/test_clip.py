"""CLIP's encoders: what transformers computes, its sizes; pseudo-words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import PIPELINES, golden, network, relative
from reference import make_stable_diffusion as reference

from jaxood.errors import UserError
from jaxood.models.clip import text, vision


def prompt_ids(pipeline):
    """The ids of `reference.PROMPTS`: the first is cut from a longer text, the second is empty."""
    tokens, _ = reference.vocabulary()
    start, end = tokens[reference.START], tokens[reference.END]
    pad = tokens[reference.PIPELINES[pipeline]['pad']] if pipeline != 'clip' else end
    words = ['a</w>', 'photo</w>', 'of</w>', 'a</w>', 'three</w>']
    rows = [[start, *(tokens[w] for w in words), end], [start, end]]
    return np.array([row + [pad] * (77 - len(row)) for row in rows], np.int32)


def count(module, *inputs):
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    return sum(leaf.size for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize('pipeline', PIPELINES)
def test_the_text_encoder_computes_what_transformers_computes(pipeline):
    modules, variables = network(pipeline, 'text_encoder')
    got = jax.jit(modules[''].apply)(variables, prompt_ids(pipeline))
    assert relative(got['hidden'], golden()[f'{pipeline}/hidden']) < 1e-4
    assert relative(got['pooled'], golden()[f'{pipeline}/pooled']) < 1e-4
    assert 'projected' not in got


def test_both_encoders_of_a_clip_compute_what_transformers_computes():
    modules, variables = network('clip', 'clip')
    parts = {name: {'params': variables['params'][name]} for name in ('text', 'vision')}
    got = jax.jit(modules['text'].apply)(parts['text'], prompt_ids('clip'))
    assert relative(got['projected'], golden()['clip/projected_text']) < 1e-4
    got = jax.jit(modules['vision'].apply)(parts['vision'], reference.images(12))
    assert relative(got['pooled'], golden()['clip/pooled_image']) < 1e-4
    assert relative(got['projected'], golden()['clip/projected_image']) < 1e-4


def test_the_sizes_of_vit_l_14_are_the_public_ones():
    ids = jnp.zeros((1, 77), jnp.int32)
    assert count(text.Text(), ids) == 123_060_480
    assert count(text.Text(projection=768), ids) == 123_060_480 + 768 * 768
    assert count(vision.Vision(), jnp.zeros((1, 224, 224, 3))) == 303_966_208


def test_a_token_sees_only_those_before_it():
    modules, variables = network('sd1', 'text_encoder')
    apply, ids = jax.jit(modules[''].apply), prompt_ids('sd1')
    changed = np.where(np.arange(77) < 4, ids, 7)
    a, b = (apply(variables, x)['hidden'] for x in (ids, changed))
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert np.abs(a[:, 4:] - b[:, 4:]).max() > 0.1


def test_a_pseudo_word_with_the_vector_of_a_word_means_the_same():
    """And only the prompts that have it depend on it."""
    modules, variables = network('sd1', 'text_encoder')
    model, table = modules[''], variables['params']['embeddings']['token_embedding']['embedding']
    ids = prompt_ids('sd1')
    asked = np.where(ids == ids[0, 5], model.vocab_size + 1, ids)
    extra = jnp.stack([jnp.zeros(16), table[ids[0, 5]]])

    @jax.jit
    def influence(extra, row):
        loss = lambda e: jnp.sum(jnp.tanh(model.apply(variables, asked, e)['hidden'][row]))
        return model.apply(variables, asked, extra), jax.grad(loss)(extra)

    want = jax.jit(model.apply)(variables, ids)
    got, with_it = influence(extra, 0)
    for key in want:
        np.testing.assert_allclose(got[key], want[key], atol=1e-6)
    assert np.all(with_it[0] == 0.0)  # of the other pseudo-word
    assert np.abs(with_it[1]).max() > 1e-3
    assert np.all(influence(extra, 1)[1] == 0.0)


@pytest.mark.parametrize('end', ['named', 'not named'])
def test_the_end_of_a_text_is_found_whatever_the_pseudo_words_are(end):
    modules, variables = network('sd1', 'text_encoder')
    model = modules['']
    model = model.clone(end=model.vocab_size - 1 if end == 'named' else None)
    ids = prompt_ids('sd1').copy()
    ids[0, 3] = model.vocab_size  # the largest id of the row, not its end
    got = jax.jit(model.apply)(variables, ids, jnp.ones((1, 16)))
    np.testing.assert_array_equal(got['pooled'][0], got['hidden'][0, 6])
    np.testing.assert_array_equal(got['pooled'][1], got['hidden'][1, 1])


def test_eos_token_id_2_stands_for_the_largest_id():
    config = reference.config('sd1', 'text_encoder')
    assert text.from_config(config, projection=False).end == config['eos_token_id']
    assert text.from_config(config | {'eos_token_id': 2}, projection=False).end is None


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(hidden_act='relu'), "the activation of the text encoder, 'relu' is not known"),
        (dict(num_attention_heads=3), 'hidden_size=16, which its 3 heads do not divide'),
    ],
)
def test_networks_that_we_do_not_have(change, message):
    with pytest.raises(UserError, match=message):
        text.from_config(reference.config('sd1', 'text_encoder') | change, projection=False)


def test_images_of_another_size():
    modules, variables = network('clip', 'clip')
    with pytest.raises(UserError, match='positions for 12 x 12 pixels, these images have 16 x 12'):
        modules['vision'].apply(
            {'params': variables['params']['vision']}, jnp.zeros((1, 16, 12, 3))
        )
