"""Which methods a config asks for, what is computed once, and what is said of a bad network."""

import json
import os

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from jaxood import artefacts, main, parallel
from jaxood.data import augment
from jaxood.data.examples import Examples
from jaxood.errors import ConfigError, UserError
from jaxood.models import Classifier, frozen
from jaxood.models.backbones.cnn import CNN
from jaxood.models.heads import Linear
from jaxood.scores import SCORES
from jaxood.stages import common, score
from jaxood.stages.parts import networks, scorers

ARMS = dict(main=dict(outliers=dict(name='none'), detector=dict(name='plain')))
LOOK = {'mean': (0.3,), 'std': (0.4,)}


def plain_config(**changes):
    return tiny.config(arms=ARMS, report__arm='main', **changes)


# ---- which methods --------------------------------------------------------------------------


def test_a_sweep_is_one_more_row():
    sweep = dict(k=(1, 5), name_of_nothing=(2.0,))
    config = plain_config(scores=dict(msp={}, near=dict(name='knn', k=3, sweep=sweep)))
    found = scorers.methods(config)
    assert [m.label for m in found] == ['msp', 'near', 'near_validated']
    assert [m.where for m in found] == ['config.scores.msp', *['config.scores.near'] * 2]
    assert list(found[1].candidates()) == [{'name': 'knn', 'k': 3}]
    assert list(found[2].candidates()) == [
        {'name': 'knn', 'k': k, 'name_of_nothing': 2.0} for k in (1, 5)
    ]


@pytest.mark.parametrize(
    ('sweep', 'message'),
    [
        (dict(k=()), r'scores.knn.sweep.k=\(\): give a tuple'),
        (dict(k=5), 'scores.knn.sweep.k=5: give a tuple'),
        ((1, 2), r'scores.knn.sweep=\(1, 2\) must be a section'),
        (dict(kk=(1, 2)), "scores.knn.kk .* Did you mean 'k'"),
        (dict(k=('a',)), "scores.knn.k='a' must be int"),
        (dict(k=(1, 10**6)), 'there are only .* to be neighbours'),
    ],
)
def test_a_sweep_that_cannot_be(sweep, message, tmp_path):
    config = plain_config(scores=dict(msp={}, knn=dict(k=3, sweep=sweep)))
    with pytest.raises(ConfigError, match=message):
        main.execute(config, str(tmp_path))
    assert not (tmp_path / 'artefacts').exists()


# ---- through a run --------------------------------------------------------------------------


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """(artefacts folder, workdir) of a run with two methods."""
    folder = tmp_path_factory.mktemp('shared')
    scores = dict(msp={}, knn=dict(k=3, sweep=dict(k=(1, 5))))
    config = plain_config(scores=scores, artefacts_dir=str(folder / 'all'))
    main.execute(config, str(folder / 'first'))
    return folder / 'all', folder / 'first'


def times(folder, pattern):
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern) if path.is_file()}


def test_another_workdir_adds_a_method_and_redoes_nothing_else(shared, tmp_path):
    store, _ = shared
    before = times(store, 'features/*/*') | times(store, 'scores/*/*.npz')
    scores = dict(msp={}, maxlogit={}, knn=dict(k=3, sweep=dict(k=(1, 5))))
    config = plain_config(scores=scores, artefacts_dir=str(store))
    main.execute(config, str(tmp_path))
    after = times(store, 'features/*/*') | times(store, 'scores/*/*.npz')
    assert before.items() <= after.items()
    assert {path.parts[-3] for path in after.keys() - before.keys()} == {'scores'}
    assert len(after) - len(before) == 4  # maxlogit of test, validation and two OOD sets


def test_settings_are_chosen_on_validation_data(shared):
    """The chosen one has the best AUROC there, and its scores are those of its settings."""
    _, workdir = shared
    runs = json.loads((workdir / 'runs.json').read_text())
    folder = epath.Path(os.path.normpath(workdir / runs['main']['0']['score']))
    told = json.loads((folder / 'knn_validated.json').read_text())
    tried = {one['settings']['k']: one['auroc'] for one in told['validation']}
    assert set(tried) == {1, 5}
    assert told['settings'] == {'name': 'knn', 'k': max(tried, key=tried.get)}
    assert told['chosen'] == 'validated'
    assert json.loads((folder / 'knn.json').read_text())['settings'] == {'name': 'knn', 'k': 3}
    rows = (workdir / 'results.csv').read_text()
    assert 'knn_validated' in rows
    assert '""chosen"": ""validated""' in rows


def test_what_looks_inside_the_network_goes_through_a_run_and_predicts(shared, tmp_path):
    """ODIN without temperature and step is MSP, computed from images instead of outputs."""
    store, _ = shared
    odin = dict(name='odin', temperature=1.0, epsilon=0.0)
    config = plain_config(scores=dict(msp={}, odin=odin), artefacts_dir=str(store))
    main.execute(config, str(tmp_path))
    runs = json.loads((tmp_path / 'runs.json').read_text())
    folder = epath.Path(os.path.normpath(tmp_path / runs['main']['0']['score']))
    a, b = (artefacts.load(folder / f'{m}/test.npz')['score'] for m in ('msp', 'odin'))
    shift = np.log(common.load_data(config).num_classes)  # ODIN's scale starts at -log K
    np.testing.assert_allclose(b + shift, a, atol=1e-4)


# ---- one network ----------------------------------------------------------------------------


@pytest.fixture
def network():
    model = Classifier(backbone=CNN(widths=(4, 8)), head=Linear(num_classes=3))

    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1)), train=False)
    return networks.Network(model, variables, LOOK, 'a network', parallel.setup(), 16)


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count).astype(np.int32)
    return Examples(
        rng.integers(256, size=(count, 8, 8, 1), dtype=np.uint8), labels, ('a', 'b', 'c')
    )


def test_features_are_those_of_the_network_and_computed_once(network, tmp_path, monkeypatch):
    store, examples = artefacts.Store(tmp_path), images(40)
    got = network.features(store, examples, 'features')
    x = augment.standardise(examples.images, **LOOK)
    want = network.model.apply(network.variables, x, train=False)
    for name in ('logits', 'features'):
        assert isinstance(got[name], np.memmap)
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    np.testing.assert_array_equal(got['labels'], examples.labels)
    monkeypatch.setattr(networks.Network, 'stream', None)  # any further pass would fail
    again = network.features(store, examples, 'features')
    np.testing.assert_array_equal(again['logits'], got['logits'])


def test_an_interrupted_pass_goes_on_with_the_next_shard(network, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, 'SHARD', 16)
    store, examples, passed = artefacts.Store(tmp_path), images(40), []
    stream = networks.Network.stream

    def cut_short(self, chunks):
        if len(passed) == 2:
            raise MemoryError
        passed.append(1)
        return stream(self, chunks)

    monkeypatch.setattr(networks.Network, 'stream', cut_short)
    with pytest.raises(MemoryError):
        network.features(store, examples, 'features')
    passed.clear()
    got = network.features(store, examples, 'features')
    assert len(passed) == 1  # two of three shards were there
    monkeypatch.undo()
    want = network.features(artefacts.Store(tmp_path / 'anew'), images(40), 'features')
    np.testing.assert_array_equal(got['features'], want['features'])


def test_other_weights_or_images_are_other_features(network):
    store = artefacts.Store('anywhere')
    one = networks.find_features(store, 'a', 'b').folder
    assert one != networks.find_features(store, 'a2', 'b').folder
    assert one != networks.find_features(store, 'a', 'b2').folder
    assert images(5).digest != images(5, seed=1).digest


def test_scores_that_are_fitted_on_nothing_compute_nothing(network, tmp_path):
    sets = {'train': images(30), 'validation': images(20, seed=1)}
    bank = scorers.Bank(artefacts.Store(tmp_path), network, sets)
    scorers.fit(bank, {'name': 'energy', 'temperature': 2.0}, 'config.scores.energy')
    assert not (tmp_path / 'features').exists()
    scorers.fit(bank, {'name': 'knn', 'k': 2}, 'config.scores.knn')
    assert len(list((tmp_path / 'features').iterdir())) == 1  # the training set's alone


def test_a_function_over_the_bank_sees_every_row_once_in_order(network, tmp_path, compiled):
    """Padding is gone, `rows` picks, and what is seen is what the network computes."""
    bank = scorers.Bank(artefacts.Store(tmp_path), network, {'train': images(40)})
    f = lambda outputs, head: {'m': outputs['maps'][0].mean((1, 2)), 'z': outputs['logits']}
    parts = list(bank.map('train', f))
    want = bank.outputs('train')['logits']
    np.testing.assert_allclose(np.concatenate([p['z'] for p in parts]), want, atol=1e-5)
    rows = np.array([3, 1, 33])
    compiled.clear()
    some = list(bank.map('train', f, rows=rows))
    assert compiled == []
    np.testing.assert_allclose(np.concatenate([p['z'] for p in some]), want[rows], atol=1e-5)


def test_a_network_goes_on_from_its_own_maps(network):
    x = augment.standardise(images(4).images, **LOOK)
    net = frozen.Frozen(network.variables, np.ones(1, np.float32), network.model)
    whole = net.forward(x)
    assert [r.shape for r in whole['relus']] == [(4, 8, 8, 4), (4, 4, 4, 8)]
    np.testing.assert_allclose(np.maximum(whole['relus'][1], 0), whole['maps'][1])
    rest = net.resume(0, whole['maps'][0])
    np.testing.assert_allclose(rest['logits'], whole['logits'], atol=1e-6)
    assert len(rest['maps']) == len(rest['relus']) == 1


def test_a_score_that_is_no_number_names_the_image(network, tmp_path, monkeypatch):
    bank = scorers.Bank(artefacts.Store(tmp_path), network, {'train': images(4)})
    broken = SCORES['msp']._replace(score=lambda params, outputs, head: outputs['logits'][:, 0] / 0)
    monkeypatch.setitem(SCORES, 'msp', broken)
    fitted = scorers.fit(bank, {'name': 'msp'}, 'config.scores.msp')
    with pytest.raises(
        UserError, match='config.scores.msp: the score of image 0 is .*not a number'
    ):
        fitted(bank.outputs('train'), None)


# ---- near chance ----------------------------------------------------------------------------


def one_hot(predicted):
    return np.eye(10)[predicted]


def test_accuracy_near_chance_is_explained():
    labels = np.arange(1000) % 10
    rng = np.random.default_rng(0)
    assert score.warning(one_hot(labels), labels, LOOK) is None
    assert score.warning(one_hot(np.where(labels < 3, labels, 0)), labels, LOOK) is None
    noise = score.warning(one_hot(rng.integers(10, size=1000)), labels, LOOK)
    assert 'near chance' in noise
    assert str(LOOK['mean']) in noise
    turned = score.warning(one_hot((labels + 1) % 10), labels, LOOK)
    assert 'in another order it would be 100.0 %' in turned
    assert 'normalisation' not in turned


def test_cached_outputs_score_as_arrays(network, tmp_path):
    """Scores on cached outputs equal those on arrays."""
    store = artefacts.Store(tmp_path)
    bank = scorers.Bank(store, network, {'train': images(40)})
    known = network.features(store, images(25, seed=3), 'test')
    fitted = scorers.fit(bank, {'name': 'knn', 'k': 1}, 'config.scores.knn')
    got = fitted(known, None)
    params = SCORES['knn'].fit({'features': np.asarray(bank.outputs('train')['features'])}, {}, k=1)
    want = np.asarray(SCORES['knn'].score(params, known, {}))
    np.testing.assert_allclose(got, want, atol=1e-5)
