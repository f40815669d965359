"""Labels that nobody wrote: three ways to them, what is refused, and what later stages see."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from etils import epath

from jaxood import artefacts, experiment, main, parallel
from jaxood.errors import ConfigError, UserError
from jaxood.stages import common, pseudo_label
from jaxood.stages.parts import scan


def phase(**more):
    optimizer = dict(name='adam', learning_rate=3e-3)
    own = dict(steps=6, batch_size=32, optimizer=optimizer, log_every=3, checkpoint_every=2)
    return own | more


def section(**changes):
    views = dict(contrast=dict(name='weak', pad=1), weak=dict(name='plain'))  # quick to compile
    found = dict(
        name='scan',
        classes=7,
        smallest=0.0,
        backbone=dict(name='cnn', widths=(4, 8)),
        views=views | dict(strong=dict(name='weak', pad=2)),
        pretext=phase(temperature=0.2),
        clustering=phase(neighbours=5, entropy_weight=2.0),
        self_labelling=phase(threshold=0.1),
    )
    for path, value in changes.items():
        *sections, key = path.split('__')
        place = found
        for name in sections:
            place = place[name]
        place[key] = value
    return found


KMEANS = dict(name='kmeans', classes=7, smallest=0.1, weights='pixels', restarts=2)


def config(labelling=None, stages=('pseudo_label',), **changes):
    c = tiny.config(stages=stages, parallel__num_devices=1, **changes)
    with c.unlocked():
        c.pseudo_label = labelling or section()
    return c


def artefact(folder, stage='pseudo_label'):
    place = json.loads((folder / 'runs.json').read_text())['diffusion']['0'][stage]
    return artefacts.Artefact(stage, '', epath.Path(folder / place))


def refused(folder, message, labelling, **changes):
    with pytest.raises(UserError, match=message):
        main.execute(config(labelling, **changes), str(folder))
    assert not list(folder.glob('artefacts/*/*/done.json'))


@pytest.fixture(scope='module')
def clustered(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scan')
    main.execute(config(), str(folder))
    return folder


def test_scan_writes_clusters_and_how_they_agree(clustered):
    data, made = common.load_data(config()), artefact(clustered)
    clusters = artefacts.load(made / 'clusters.npz')
    assert clusters['train'].shape == (len(data.id.train),)
    assert set(clusters['train']) <= set(range(7))
    assert clusters['confusion'].sum() == len(data.id.train)
    assert sorted(clusters['match']) == list(range(7))
    right = np.trace(clusters['confusion'][:, clusters['match']])
    facts = made.done
    assert facts['agreement']['train']['accuracy'] == pytest.approx(right / len(data.id.train))
    assert set(facts['agreement']['validation']) == {'accuracy', 'nmi', 'ari'}
    assert sum(facts['sizes']) == len(data.id.train)
    assert 0.0 < facts['neighbours_alike'] <= 1.0


def test_a_phase_that_is_done_is_not_done_again(clustered, tmp_path, monkeypatch):
    """A run that was cut off goes on with the phase it was in, and ends with the same clusters."""
    made = artefact(clustered)
    before = artefacts.load(made / 'clusters.npz')
    (made / 'done.json').unlink()
    (made / 'self_labelling/weights').rmtree()
    ran, fit = [], scan.loop.fit

    def spy(*args, **keywords):
        ran.append(keywords['folder'].name)
        return fit(*args, **keywords)

    monkeypatch.setattr(scan.loop, 'fit', spy)
    main.execute(config(), str(clustered))
    assert ran == ['self_labelling']
    after = artefacts.load(artefact(clustered) / 'clusters.npz')
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])


def by_hand(folder, mode='jit', labels=True, steps=2):
    """Logits of `scan.train` on validation images, after a few steps of SGD."""
    c = config()
    c.parallel.update(mode=mode, num_devices=2)
    run = experiment.check(c)[0]
    data = common.load_data(run.config)
    if not labels:
        bare = dataclasses.replace(data.id.train, labels=None, class_names=())
        data = dataclasses.replace(data, id=dataclasses.replace(data.id, train=bare))
    context = common.Context(
        config=run.config,
        data=data,
        devices=parallel.setup(mode, 2),
        artefact=artefacts.Artefact('pseudo_label', '', epath.Path(folder)),
        inputs={},
        store=artefacts.Store(folder),
        what=mode,
        runs=[run],
        repro={},
    )
    plan = pseudo_label._plan(pseudo_label._pick(run.config))
    sgd = dict(name='sgd', learning_rate=0.1, weight_decay=0.0)
    for name in plan.phases:
        plan.phases[name].update(optimizer=sgd, steps=steps)
    return scan.train(context, plan)[0].outputs(context.data.id.validation)['logits']


@pytest.mark.slow
def test_pmap_learns_what_jit_learns_and_labels_teach_nothing(tmp_path):
    """Losses that compare rows with each other see those of all devices. And the same images
    without their labels make the same network."""
    want = by_hand(tmp_path / 'jit')
    np.testing.assert_allclose(by_hand(tmp_path / 'pmap', mode='pmap'), want, atol=2e-3)
    np.testing.assert_array_equal(by_hand(tmp_path / 'bare', labels=False), want)


def test_kmeans_on_pixels_finds_digits(tmp_path):
    main.execute(config(KMEANS), str(tmp_path))
    assert artefact(tmp_path).done['agreement']['train']['accuracy'] > 0.7
    assert artefact(tmp_path).done['features'] == 'pixels'


def test_kmeans_on_a_pretrained_backbone(tmp_path):
    """Its features, not its logits; the weights' contents are in the fingerprint."""
    path, _, _ = tiny.weights(tmp_path / 'net')
    main.execute(config(KMEANS | dict(weights=path, smallest=0.0)), str(tmp_path / 'run'))
    assert artefact(tmp_path / 'run').done['features'] == 'a test'
    other, _, _ = tiny.weights(tmp_path / 'other', seed=1)
    prints = [
        pseudo_label.settings(experiment.check(config(KMEANS | dict(weights=p)))[0].config)
        for p in (path, other)
    ]
    assert prints[0] != prints[1]


def test_given_labels_are_the_users(tmp_path):
    main.execute(config(dict(name='given', smallest=0.0)), str(tmp_path))
    data = common.load_data(config())
    clusters = artefacts.load(artefact(tmp_path) / 'clusters.npz')
    np.testing.assert_array_equal(clusters['train'], data.id.train.labels)
    assert artefact(tmp_path).done['agreement']['train']['accuracy'] == 1.0


def test_later_stages_see_clusters_and_nothing_else(clustered):
    c = experiment.check(config())[0].config
    raw, data = common.load_data(c), common.seen(c, {'pseudo_label': artefact(clustered)})
    clusters = artefacts.load(artefact(clustered) / 'clusters.npz')
    np.testing.assert_array_equal(data.id.train.labels, clusters['train'])
    assert data.class_names == tuple(f'cluster {k}' for k in range(7))
    # what cluster a class is matched with: the classifier's accuracy can be told
    np.testing.assert_array_equal(clusters['match'][data.id.test.labels], raw.id.test.labels)
    assert data.id.train.digest != raw.id.train.digest
    assert common.seen(c, {}).class_names == raw.class_names
    before = common.seen(c, {'pseudo_label': artefacts.Artefact('', '', epath.Path('/none'))})
    assert before.num_classes == 7
    assert before.id.test.labels is None


def test_other_counts_of_clusters_and_classes_leave_accuracy_unknown():
    data = common.load_data(config())
    clusters = {
        'train': np.zeros(len(data.id.train), np.int32),
        'match': np.arange(5, dtype=np.int32),
    }
    assert data.relabelled(5, clusters).id.test.labels is None


# ---- what it refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('labelling', 'message'),
    [
        (dict(classes=1), r'pseudo_label\.classes=1 must be a whole number of at least 2'),
        (dict(classes=5000), r'classes=5000 clusters are more than the \d+ training images'),
        (dict(smallest=2.0), r'pseudo_label\.smallest=2\.0 must be a number, between 0'),
        (dict(clustering__neighbours=5000), r'neighbours=5000, but an image has only \d+ others'),
        (dict(pretext__batch_size=5000), r'pretext\.batch_size=5000 is more than the \d+ ID'),
        (dict(pretext__steps=None), r'pseudo_label\.pretext\.steps is missing'),
        (dict(pretext__temprature=1.0), r"pretext\.temprature.*Did you mean 'temperature'"),
        (dict(pretext__temperature=0.0), r'temperature=0\.0 must be a number, at least 1e-06'),
        (dict(self_labelling__threshold=1.5), r'threshold=1\.5 must be a number, between 0'),
        (dict(views__strong=dict(name='strnog')), r"views\.strong\.name='strnog' is not known"),
        (dict(views__strong=dict(name='strong')), r'views\.strong: cutout=16 must be from 1 to 8'),
        (dict(views=dict(weak=dict(name='plain'))), r'views\.contrast is not set'),
        (dict(backbone=dict(name='cn')), r"pseudo_label\.backbone\.name='cn' is not known"),
        (dict(name='scam'), r"pseudo_label\.name='scam' is not known\. Did you mean 'scan'"),
    ],
)
def test_what_scan_refuses(tmp_path, labelling, message):
    refused(tmp_path, message, section(**labelling))


def test_what_kmeans_refuses(tmp_path):
    refused(
        tmp_path, r'weights is not set, and neither is config\.weights', KMEANS | {'weights': None}
    )
    refused(tmp_path, r'restarts=0 must be a whole number', KMEANS | {'restarts': 0})


def test_a_collapse_stops_with_advice(tmp_path):
    labelling = section(smallest=1.0)  # nothing is as even as that
    refused(
        tmp_path, r'config\.pseudo_label: the clustering has collapsed.*entropy_weight', labelling
    )


def test_given_needs_labels(tmp_path):
    np.savez(tmp_path / 'a.npz', images=np.zeros((60, 8, 8), np.uint8))
    c = config(dict(name='given', smallest=0.0), data__held_out=(), data__held_out_validation=())
    with c.unlocked():
        c.data.id = dict(name='npz', path=str(tmp_path / 'a.npz'))
    with pytest.raises(ConfigError, match='have no labels, which pseudo_label learns from'):
        main.execute(c, str(tmp_path / 'run'))
