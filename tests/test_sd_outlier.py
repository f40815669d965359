"""`configs/sd_outlier.py`, cut down: from images without labels to a report and to decisions."""

import csv
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from jaxood import artefacts, experiment, main, predict
from jaxood.errors import UserError
from jaxood.stages import common
from jaxood.train import checkpoint

CONFIG = 'configs/sd_outlier.py'


def tiny(variant='digits', arms=('none', 'fake_it', 'ours', 'control', 'dn2')):
    """Small networks, trainings of a few steps, edits of three steps."""
    c = main.load_config(f'{CONFIG}:{variant}')
    c.seeds = (0,)
    c.parallel.num_devices = 1
    small = dict(name='cnn', widths=(4, 8))
    view = dict(name='weak', pad=1, flip=False)
    with c.unlocked():
        c.pseudo_label.update(backbone=small, smallest=0.0)
        c.pseudo_label.views = dict(contrast=view, weak=dict(name='plain'), strong=view)
        c.backbone = small
        c.arms = {k: c.arms[k] for k in arms}
    for name in ('pretext', 'clustering', 'self_labelling'):
        c.pseudo_label[name].update(steps=4, batch_size=32, log_every=2)
    c.generator.update(channels=8, multipliers=(1,), attention_sizes=(), num_blocks=1)
    c.diffusion.update(steps=8, batch_size=16, log_every=4)
    c.diffusion.optimizer.warmup = 2
    c.sampler.steps = 30  # three of them below S = 100
    c.detector.update(steps=8, batch_size=16, log_every=4)
    for arm in c.arms.values():
        if 'diffusion' in arm:
            arm.diffusion.steps = 4
        if 'sampler' in arm and 'steps' in arm.sampler:
            arm.sampler.steps = 3
    c.report.update(draws=20, gallery=8, tsne=False, arm='ours' if 'ours' in arms else arms[-1])
    return c


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sd_outlier')
    main.execute(tiny(), str(folder))
    return folder


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    for name in predict.FLAGS:
        predict.FLAGS[name].unparse()


def made(folder, stage, arm='ours'):
    return epath.Path(folder / json.loads((folder / 'runs.json').read_text())[arm]['0'][stage])


def test_the_generator_and_the_detector_learn_from_clusters(finished):
    clusters = artefacts.load(made(finished, 'pseudo_label') / 'clusters.npz')['train']
    outliers = artefacts.load_table(made(finished, 'synthesise') / 'outliers')
    np.testing.assert_array_equal(outliers['label'], clusters[outliers['source']])
    assert len(outliers['images']) == len(clusters)  # one outlier an image
    assert sorted(outliers['source']) == list(range(len(clusters)))
    place = made(finished, 'synthesise') / 'index.jsonl'
    index = [json.loads(line) for line in place.read_text().splitlines()]
    assert all(line['label'] != line['first'] for line in index)
    assert index[0]['first_class'].startswith('cluster ')
    assert json.loads((made(finished, 'train_detector') / 'done.json').read_text())['out'] > 0.0


def test_controls_are_kept_apart_from_outliers(finished):
    place = made(finished, 'synthesise', 'control')
    outliers, controls = (artefacts.load_table(place / k) for k in ('outliers', 'controls'))
    count = len(outliers['images'])
    assert 0.7 < len(controls['images']) / count < 1.4
    index = [json.loads(line) for line in (place / 'index.jsonl').read_text().splitlines()]
    assert sum(line['kept'] for line in index) == count
    assert all((line['first'] != line['label']) == line['kept'] for line in index)
    assert not (made(finished, 'synthesise') / 'controls').exists()


def test_dn2_is_the_clustering_network_as_it_is(finished):
    start = checkpoint.load_weights(made(finished, 'pseudo_label') / 'weights')
    there = checkpoint.load_weights(made(finished, 'train_detector', 'dn2') / 'weights')
    ours = checkpoint.load_weights(made(finished, 'train_detector') / 'weights')
    kernel = lambda v: np.asarray(v['params']['backbone']['conv0']['kernel'])
    np.testing.assert_array_equal(kernel(start), kernel(there))
    assert np.abs(kernel(start) - kernel(ours)).max() > 0


def test_the_report_tells_of_it(finished):
    sections = json.loads((finished / 'results.json').read_text())['summary']['sections']
    labels = sections['pseudo_labels'][0]
    assert set(labels['agreement']) == {'train', 'validation'}
    found = {row['arm']: row for row in sections['discrepancy']['test']}
    assert set(found) == {'none', 'fake_it', 'ours', 'control', 'dn2'}
    for row in found.values():
        assert set(row['auroc']) == {'both', 'distance', 'votes'}
        assert all(0.0 <= x['low'] <= x['mean'] <= x['high'] <= 1.0 for x in row['auroc'].values())
    assert found['dn2']['auroc']['votes']['mean'] == 0.5  # nobody votes
    assert 'led to their own class' in found['ours']['binary']
    assert found['none']['binary'] == {}
    own = next(x for x in sections['discrepancy']['scores'] if x['score'] == 'both')
    assert own['gain']['mean'] == 0.0
    assert {tuple(row['outliers']) for row in sections['examination']} == {
        ('ours',),
        ('control',),
        ('fake_it',),
    }
    page = (finished / 'report.html').read_text()
    for text in ('Semantic-discrepant outliers', 'cluster 0 →', 'The poster’s own figures'):
        assert text in page


def test_accuracy_is_that_of_matched_clusters_and_only_of_classifiers(finished):
    with open(finished / 'results.csv') as f:
        accuracy = {row['run_id']: row['id_acc'] for row in csv.DictReader(f)}
    assert accuracy['fake_it/0'] == accuracy['dn2/0'] == ''
    c = experiment.check(tiny())[0].config
    inputs = {'pseudo_label': artefacts.Artefact('', '', made(finished, 'pseudo_label'))}
    labels = common.seen(c, inputs).id.test.labels
    told = artefacts.load(made(finished, 'score') / 'both/test.npz')
    np.testing.assert_array_equal(told['label'], labels)
    assert float(accuracy['ours/0']) == pytest.approx(np.mean(told['pred'] == labels), abs=1e-6)


def test_predict_keeps_both_banks(finished, tmp_path, capsys):
    """The same scores as the run's own; and a clear word once the bank is gone."""
    test = common.load_data(tiny()).id.test
    (tmp_path / 'photos').mkdir()
    for i in range(5):
        Image.fromarray(test.images[i, ..., 0]).save(tmp_path / f'photos/{i}.png')
    arguments = [f'--workdir={finished}', str(tmp_path / 'photos')]
    assert predict.main(['predict', *arguments]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    want = artefacts.load(made(finished, 'score') / 'both/test.npz')['score'][:5]
    np.testing.assert_allclose([float(row['score']) for row in rows], want, atol=1e-5)
    assert all(row['class'].startswith('cluster ') for row in rows)

    (finished / 'artefacts/features').rename(tmp_path / 'features')
    outliers = made(finished, 'synthesise') / 'outliers'
    outliers.rename(tmp_path / 'outliers')
    try:
        assert predict.main(['predict', *arguments]) == 2
        assert 'has no bank to compare images with' in capsys.readouterr().err
    finally:
        (tmp_path / 'features').rename(finished / 'artefacts/features')
        epath.Path(tmp_path / 'outliers').rename(outliers)


@pytest.mark.slow
def test_a_folder_without_labels(tmp_path):
    """All of it on images that nobody labelled, in one folder; and there is no accuracy to tell."""
    (tmp_path / 'flat').mkdir()
    digits = common.load_data(tiny()).id
    splits = (digits.train, digits.validation, digits.test)  # as many: the same compiled programs
    for i, image in enumerate(np.concatenate([examples.images for examples in splits])):
        Image.fromarray(image[..., 0]).save(tmp_path / f'flat/{i:04d}.png')
    c = tiny(arms=('ours',))
    c.data.update(held_out=(), held_out_validation=())
    with c.unlocked():
        c.data.id = dict(name='folder', path=str(tmp_path / 'flat'))
        c.report.judge = None
    main.execute(c, str(tmp_path / 'run'))
    summary = json.loads((tmp_path / 'run/results.json').read_text())['summary']
    assert summary['sections']['pseudo_labels'][0]['agreement'] is None
    assert 'id_acc' not in summary['cells']['ours']['both']['test']
    assert '7 classes found without labels' in (tmp_path / 'run/report.html').read_text()


def test_every_variant_reads():
    for variant, count in (
        ('digits', 7),
        ('digits,ablation', 12),
        ('cifar10,resnet18', 7),
        ('cifar100,wrn,small', 6),
        ('folder', 7),
        ('folder,small,ablation', 12),
    ):
        c = main.load_config(f'{CONFIG}:{variant}')
        assert c.report.arm in c.arms
        assert len(c.arms) == count
        experiment.check(c)
    assert main.load_config(f'{CONFIG}:cifar10').detector.frozen == 6
    with pytest.raises(UserError, match=r"variant 'ablatoin'.*ablation"):
        main.load_config(f'{CONFIG}:digits,ablatoin')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c.outliers.update(depth=1001), r'config\.outliers\.depth=1001 .* 0\.\.1000'),
        (lambda c: c.sampler.update(guidance=float('nan')), r'sampler\.guidance=nan must be a fin'),
        (lambda c: c.outliers.update(same=2.0), r'config\.outliers: same=2\.0 is a share'),
        (
            lambda c: c.outliers.update(per_image=0),
            r'config\.outliers\.per_image=0 must be a whole',
        ),
        (
            lambda c: c.outliers.update(count=5),
            r'count=5, per_image=1, per_class=None\. Set one of them',
        ),
        (lambda c: c.detector.update(weight=1.5), r'config\.detector: weight=1\.5'),
        (lambda c: c.head.update(name='linear'), r"'three_head' trains a head of its own"),
        (lambda c: c.detector.update(frozen=2), r'detector\.frozen=2: only a vit has blocks'),
        (lambda c: c.detector.update(init='wieghts'), r"init='wieghts' is not known"),
        (lambda c: c.detector.update(init='weights'), r'config\.weights names no checkpoint'),
        (lambda c: c.backbone.update(widths=(4, 9)), r'Make them the same'),
        (lambda c: c.scores.both.update(k=5000), r'config\.scores\.both\.k=5000, but there are'),
        (lambda c: c.pseudo_label.update(classes=1), r'classes=1 must be a whole number of at l'),
        (lambda c: c.pseudo_label.update(classes=5000), r'classes=5000 clusters are more than'),
        (lambda c: c.diffusion.update(label_dropout=0.0), r'needs an unconditional branch'),
    ],
)
def test_what_it_refuses(tmp_path, change, message):
    c = tiny()
    with c.unlocked():
        change(c)
    with pytest.raises(UserError, match=message):
        main.execute(c, str(tmp_path))
    assert not list(tmp_path.glob('artefacts/*/*/done.json'))
