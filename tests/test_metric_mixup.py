"""`configs/metric_mixup.py`, cut down: heads x outliers as one run with one table."""

import json

import pytest

from jaxood import main
from jaxood.errors import UserError

CONFIG = 'configs/metric_mixup.py'


HEADS, KINDS = ('softmax', 'adacos'), ('none', 'mixup', 'pure')


def tiny(variant='digits'):
    """A variant with few heads and kinds, small networks and trainings of a few steps."""
    c = main.load_config(f'{CONFIG}:{variant}')
    c.seeds = (0,)
    c.parallel.num_devices = 1
    c.generator.update(channels=8, multipliers=(1,), attention_sizes=())
    c.diffusion.update(steps=8, batch_size=16, log_every=4)
    c.diffusion.optimizer.warmup = 2
    c.sampler.steps = 3
    c.outliers.update(count=45, max_candidates=45)
    c.backbone.base = 4
    c.detector.update(steps=12, batch_size=16, log_every=6)
    with c.unlocked():
        c.arms = {f'{h}_{k}': c.arms[f'{h}_{k}'] for h in HEADS for k in KINDS}
    c.report.update(arm='adacos_mixup', draws=20, gallery=8, tsne=False)
    c.report.grid.update(rows=HEADS, columns=KINDS)
    return c


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('metric_mixup')
    main.execute(tiny(), str(folder))
    return folder


def test_the_grid_is_one_run_with_one_table(finished):
    summary = json.loads((finished / 'results.json').read_text())['summary']
    assert set(summary['cells']) == {f'{h}_{k}' for h in HEADS for k in KINDS}
    scores = {'msp', 'energy', 'maxcos', 'normcos'}  # always all, or head and score are confounded
    assert all(set(methods) == scores for methods in summary['cells'].values())
    assert set(summary['grids']) == {'own', *scores}
    assert summary['grids']['own']['scores'] == {'softmax': 'msp', 'adacos': 'maxcos'}
    page = (finished / 'report.html').read_text()
    assert 'What each column brings' in page
    assert 'What each row brings' in page
    assert '“mixup” against “none”, ID accuracy of the 2 rows' in page


def test_generator_and_outliers_are_made_once(finished):
    count = lambda stage: len(list((finished / 'artefacts' / stage).iterdir()))
    assert (count('train_diffusion'), count('synthesise')) == (1, 2)
    assert count('train_detector') == len(HEADS) * len(KINDS)


def test_adacos_scale_is_kept_with_its_detector(finished):
    """Without it, a detector that is read again would have other logits."""
    from etils import epath

    from jaxood.train import checkpoint

    place = json.loads((finished / 'runs.json').read_text())['adacos_mixup']['0']['train_detector']
    weights = checkpoint.load_weights(epath.Path(finished / place / 'weights'))
    assert 1.0 <= float(weights['adacos']['head']['scale']) <= 64.0


def test_every_variant_reads():
    for variant in ('digits', 'cifar10', 'cifar100', 'cifar10,small', 'digits,adacos'):
        c = main.load_config(f'{CONFIG}:{variant}')
        assert c.report.arm in c.arms
    assert len(main.load_config(f'{CONFIG}:digits').arms) == 7 * 4
    assert main.load_config(f'{CONFIG}:cifar10,small').generator.channels == 16
    with pytest.raises(UserError, match=r"head 'arcfce'.*arcface"):
        main.load_config(f'{CONFIG}:digits,arcfce')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c.report.grid.update(rows=('softmax', 'adcos')), r"cell, 'adcos_none'"),
        (lambda c: c.report.grid.update(columns=()), r'config\.report\.grid\.columns'),
        (lambda c: c.report.grid.scores.update(softmax='mps'), r'grid\.scores\.softmax'),
        (lambda c: c.report.grid.update(rows=('softmax',)), r'config\.report\.arm'),
        (lambda c: c.outliers.update(high=1.2), r'config\.outliers: low=0\.3 and high=1\.2'),
        (
            lambda c: c.arms.softmax_pure.head.update(name='arcface', margin=1.7),
            r'config\.head: margin=1\.7',
        ),
        (lambda c: c.data.update(held_out=(2, 3, 4, 6, 7, 8, 9)), r'adacos with 2 classes'),
    ],
)
def test_what_it_refuses(tmp_path, change, message):
    c = tiny()
    with c.unlocked():
        change(c)
    with pytest.raises(UserError, match=message):
        main.execute(c, str(tmp_path))
    assert not list(tmp_path.glob('artefacts/*/*/done.json'))
