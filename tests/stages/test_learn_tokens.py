"""Textual inversion on a tiny pipeline: what moves, what starts where, what a kill costs."""

import functools
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spoken
from etils import epath

from jaxood import artefacts, main, parallel
from jaxood.errors import ConfigError, UserError
from jaxood.models.stable_diffusion import folder as folders
from jaxood.models.stable_diffusion import pipeline
from jaxood.stages import learn_tokens, words
from jaxood.stages.parts import texts
from jaxood.train import loop

SGD = dict(name='sgd', learning_rate=0.3, weight_decay=0.0)  # Adam would magnify rounding


def made(workdir, stage):
    (folder,) = (p for p in (workdir / 'artefacts' / stage).iterdir() if (p / 'done.json').exists())
    return artefacts.Artefact(stage, folder.name, epath.Path(folder))


def tokens(workdir):
    return artefacts.load(made(workdir, 'learn_tokens') / 'tokens.npz')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    place = tmp_path_factory.mktemp('tokens')
    config = spoken.config(place, tokens__optimizer=SGD)
    main.execute(config, str(place / 'run'))
    return place / 'run'


@pytest.fixture(scope='module')
def sd():
    return folders.load(spoken.pipeline())


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_only_the_vectors_have_moved(workdir, sd, tmp_path):
    """The pipeline that the run held in memory is the folder's, bit for bit."""
    config = spoken.config(tmp_path)
    for held, read in zip(leaves(texts.load(config, {}).params), leaves(sd.params), strict=True):
        np.testing.assert_array_equal(held, read)
    found = tokens(workdir)
    assert found['vectors'].shape == found['initial'].shape == (10, 8)
    assert np.all(np.abs(found['vectors'] - found['initial']).max(axis=1) > 1e-5)
    rows = [sd.tokenizer.ids(name) for name in spoken.CLASSES]
    table = learn_tokens.embeddings(sd.params['text_encoder'])
    np.testing.assert_array_equal(found['initial'], table[np.array(rows)[:, 0]])


def test_before_the_first_step_a_pseudo_word_is_the_name(sd):
    prompts = ['a photo of a dog', 'a photo of a truck']
    table = np.asarray(learn_tokens.embeddings(sd.params['text_encoder']))
    start = [learn_tokens.initial(table, sd.tokenizer, name, 'name') for name in ('dog', 'truck')]
    _, ids = learn_tokens.prompts(sd.tokenizer, 2, ('a photo of a {}',))
    encode = functools.partial(pipeline.encode_prompts, sd.networks, sd.params)
    got = encode(ids[:, 0], np.stack(start))
    np.testing.assert_array_equal(got, encode(sd.tokenizer(prompts)))
    assert sd.tokenizer(['<class-0>']).max() < sd.networks.text.vocab_size  # not in the original


def test_several_tokens_start_at_their_mean(sd, capsys):
    table = np.arange(2.0 * sd.tokenizer.size, dtype=np.float32).reshape(-1, 2)
    dog, cat = (sd.tokenizer.ids(name)[0] for name in ('dog', 'cat'))
    got = learn_tokens.initial(table, sd.tokenizer, 'dog cat', 'name')
    np.testing.assert_array_equal(got, (table[dog] + table[cat]) / 2)
    neutral = learn_tokens.initial(table, sd.tokenizer, 'dog', 'photo')
    np.testing.assert_array_equal(neutral, table[sd.tokenizer.ids('photo')[0]])
    learn_tokens._say_several(sd.tokenizer, ['dog', 'dog cat', 'yak'])
    assert 'mean of several tokens: dog cat (2), yak (3)' in capsys.readouterr().err


def batch(slots, count=4):
    slot = np.repeat(np.array(slots, np.int32), count)
    place = np.tile(np.arange(count, dtype=np.int32), len(slots))
    return {'slot': slot, 'number': slot + 3, 'place': place, 'row': place}


@pytest.fixture(scope='module')
def gradient(sd):
    """(token ids [2, 1, N], batch) -> (loss, the gradient of two vectors)."""
    draw = np.random.RandomState(0).standard_normal
    latents = {'mean': jnp.asarray(draw((4, 1, 4, 4, 4)), jnp.float32)}
    vectors = jnp.asarray(draw((2, 8)), jnp.float32)

    @jax.jit
    def found(ids, rows):
        loss = functools.partial(learn_tokens.loss_fn, networks=sd.networks)
        data = {'params': sd.params, 'ids': ids, 'latents': latents}
        with_rows = lambda v: loss({'vectors': v}, {}, data, rows, jax.random.key(0), 0)[0]
        return jax.value_and_grad(with_rows)(vectors)

    return found


def test_prompts_without_the_token_give_no_gradient(sd, gradient):
    with_token = learn_tokens.prompts(sd.tokenizer, 2, ('a photo of a {}',))[1]
    plain = sd.tokenizer(['a photo of a dog', 'a photo of a cat'])[:, None]
    loss, moved = gradient(with_token, batch([0, 1]))
    assert np.isfinite(loss)
    assert np.all(np.abs(moved).max(axis=1) > 1e-6)
    loss, still = gradient(plain, batch([0, 1]))
    assert np.isfinite(loss)
    np.testing.assert_array_equal(still, 0.0)


def test_a_vector_sees_the_rows_of_its_class_alone(sd, gradient):
    """And sees the same gradient whichever class is trained beside it, or none."""
    ids = learn_tokens.prompts(sd.tokenizer, 2, ('a photo of a {}',))[1]
    _, both = gradient(ids, batch([0, 1]))
    _, own = gradient(ids, batch([0, 0]))
    np.testing.assert_array_equal(own[1], 0.0)
    np.testing.assert_allclose(own[0] / 2.0, both[0], rtol=1e-4, atol=1e-6)


def test_a_prompt_is_encoded_once_or_for_each_row_alike(sd):
    _, ids = learn_tokens.prompts(sd.tokenizer, 2, learn_tokens.TEMPLATES['objects'][:3])
    vectors = np.random.RandomState(0).standard_normal((2, 8)).astype(np.float32)
    slot, which = np.array([0, 1, 1, 0, 1, 0, 1]), np.array([2, 0, 1, 1, 2, 0, 0])
    data = {'params': sd.params, 'ids': jnp.asarray(ids)}
    few = learn_tokens.contexts(sd.networks, data, vectors, slot[:4], which[:4])
    many = learn_tokens.contexts(sd.networks, data, vectors, slot, which)
    np.testing.assert_allclose(few, many[:4], atol=1e-5)
    assert np.abs(many[1] - many[2]).max() > 1e-3


def test_killed_it_ends_with_the_same_bits(workdir, tmp_path, monkeypatch):
    save = loop.Checkpoints.save

    def dies(self, step, state):
        save(self, step, state)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Checkpoints, 'save', dies)
    config = spoken.config(tmp_path, tokens__optimizer=SGD)
    with pytest.raises(KeyboardInterrupt):
        main.execute(config, str(tmp_path / 'run'), only=['learn_tokens'])
    monkeypatch.undo()
    main.execute(config, str(tmp_path / 'run'), only=['learn_tokens'])
    for name, array in tokens(workdir).items():
        np.testing.assert_array_equal(tokens(tmp_path / 'run')[name], array)
    log = made(tmp_path / 'run', 'learn_tokens') / 'classes-0000' / 'log.jsonl'
    assert [json.loads(line)['step'] for line in log.read_text().splitlines()] == [2, 4, 6]
    assert not list((tmp_path / 'run').rglob('checkpoints'))


@pytest.mark.slow
def test_layout_changes_no_vector(workdir, tmp_path):
    """Half of the classes at a time, on two devices, latents read row by row."""
    layout = dict(tokens__at_once=5, parallel__mode='pmap', parallel__num_devices=2)
    config = spoken.config(tmp_path, tokens__optimizer=SGD, data__device_limit=0, **layout)
    main.execute(config, str(tmp_path / 'run'), only=['learn_tokens'])
    got, want = (made(place, 'learn_tokens') for place in (tmp_path / 'run', workdir))
    assert got.fingerprint == want.fingerprint
    vectors = (tokens(place)['vectors'] for place in (tmp_path / 'run', workdir))
    np.testing.assert_allclose(*vectors, atol=1e-4)


def test_latents_are_dealt_alike_from_devices_and_files():
    latents = {'mean': np.arange(12.0, dtype=np.float32).reshape(12, 1, 1, 1, 1)}
    groups, how = [np.array([1, 4, 7]), np.array([2, 3, 5, 8, 11])], dict(batch_size=4, seed=0)
    resident, near = learn_tokens.feed(latents, groups, np.array([6, 9]), limit=2**20, **how)
    nothing, far = learn_tokens.feed(latents, groups, np.array([6, 9]), limit=0, **how)
    assert nothing is None
    for a, b in itertools.islice(zip(near(3), far(3)), 5):
        values = resident['mean'][a['row']].ravel()
        np.testing.assert_array_equal(b['latents']['mean'].ravel(), values)
        assert set(values[:4]) == {1, 4, 7}  # three images make a batch of four
        assert set(values[4:]) < {2, 3, 5, 8, 11}
        assert len(set(zip(a['number'], a['place']))) == 8  # each draws for itself
        np.testing.assert_array_equal(a['slot'], np.repeat([0, 1], 4))


def test_a_view_and_its_mirror_image_are_drawn(sd):
    q = {'mean': np.tile(np.array([0.0, 1.0])[None, :, None], (200, 1, 3))}
    keys = lambda purpose: jax.random.split(jax.random.key(len(purpose)), 200)
    z = np.asarray(learn_tokens.draw(q, keys, scale=2.0))
    assert set(z.ravel()) == {0.0, 2.0}
    assert 60 < (z[:, 0] == 2.0).sum() < 140
    q['log_variance'] = np.full((200, 2, 3), np.log(0.25))
    z = np.asarray(learn_tokens.draw(q, keys, scale=2.0)) - z
    assert abs(z.std() - 1.0) < 0.1


def test_all_templates_are_those_of_the_official_code():
    assert len(set(learn_tokens.TEMPLATES['objects'])) == 27
    assert all(t.count('{}') == 1 for ts in learn_tokens.TEMPLATES.values() for t in ts)


def test_words_reads_the_pseudo_words(workdir, tmp_path):
    """With vectors that have not moved, the names' own prompts."""
    run = spoken.config(tmp_path)
    clip = words.clips.load(run, {}, parallel.setup('jit', 1), 64)
    folder = tmp_path / 'artefacts' / 'learn_tokens' / 'x'
    artefact = artefacts.Artefact('learn_tokens', 'x', epath.Path(folder))
    artefacts.save(artefact / 'tokens.npz', vectors=tokens(workdir)['initial'])
    got = words.inverted(run, clip, {'learn_tokens': artefact})
    want = clip.ids(clip.tokenizer([f'a photo of a {name}' for name in spoken.CLASSES]))
    np.testing.assert_allclose(got, want, atol=1e-6)
    facts = made(workdir, 'words').done
    assert list(facts['nearest']) == list(spoken.CLASSES)
    artefacts.save(artefact / 'tokens.npz', vectors=tokens(workdir)['initial'] * -1.0)
    other = words.inverted(run, clip, {'learn_tokens': artefact})
    assert np.abs(other - want).max() > 1e-3


def named(classes, **section):
    config = types.SimpleNamespace(tokens=dict(names=(), names_file=None) | section)
    config.tokens = types.SimpleNamespace(**config.tokens, get=config.tokens.get)
    return learn_tokens.names(config, types.SimpleNamespace(class_names=tuple(classes)))


def test_classes_are_called_by_name(tmp_path):
    assert named(['maple_tree', 'dog']) == ('maple tree', 'dog')
    assert named(['0', '1'], names=('zero', 'one')) == ('zero', 'one')
    file = tmp_path / 'names.txt'
    for text in (
        'tench\ngold fish\n',
        'n02\tgold fish\tx\nn01\ttench\ty\n',
        'index\twnid\tlabel\n0\tn01\ttench\n1\tn02\tgold fish\n',  # of the shared ImageNet list
    ):
        file.write_text(text)
        assert named(['n01', 'n02'], names_file=str(file)) == ('tench', 'gold fish')


@pytest.mark.parametrize(
    ('classes', 'section', 'message'),
    [
        (['0', '1'], {}, r"classes are called '0', '1'\. Those are numbers.*tokens\.names="),
        (['n01440764'], {}, r"called 'n01440764'"),
        (['cluster 3'], {}, r"called 'cluster 3'"),
        (['a'], dict(names=('x', 'y')), r'tokens\.names has 2 names for 1 classes'),
        (['a_b', 'a b'], {}, r"two classes are called 'a b'"),
        (['a'], dict(names_file='/nowhere/n.txt'), r"names_file='/nowhere/n\.txt' cannot be read"),
        (['a'], dict(names=('x',), names_file='f'), r'are both set'),
    ],
)
def test_names_that_are_none(classes, section, message):
    with pytest.raises(ConfigError, match=message):
        named(classes, **section)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(tokens__name='inversoin'), r"name='inversoin' is not known\. Did you mean 'inver"),
        (dict(tokens__steps=0), r'config\.tokens\.steps=0 must be'),
        (dict(tokens__initial=' '), r"config\.tokens\.initial=' ' must be 'name', or a word"),
        (dict(tokens__templates='small'), r"config\.tokens\.templates='small' is not known"),
        (dict(tokens__optimizer=dict(name='adamw')), r"'adamw' decays by default"),
        (dict(tokens__sieps=3), r"config\.tokens\.sieps is not known\. Did you mean 'steps'"),
        (dict(data__channels=1), r'images of 1 channel\(s\), the generator sees 3'),
        (dict(generator__path='/nowhere'), r'config\.generator\.path: /nowhere: there is no such'),
    ],
)
def test_settings_that_cannot_work(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        main.execute(spoken.config(tmp_path, **changes), str(tmp_path / 'run'))
    assert not list(tmp_path.glob('run/artefacts/*/*/*'))


def test_a_class_without_images_is_named(tmp_path):
    config = spoken.config(tmp_path)
    archive = dict(np.load(config.data.id.path))
    there = archive['labels'] != 5
    archive |= {k: archive[k][there] for k in ('images', 'labels')}
    np.savez(config.data.id.path, **archive)
    with pytest.raises(UserError, match=r"class 'dog' has no image to train on"):
        main.execute(config, str(tmp_path / 'run'))
