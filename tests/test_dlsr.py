"""`configs/dlsr.py`, cut down: features once, restorers as arms, scores beside, and `predict`."""

import csv
import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image

from jaxood import experiment, main, predict
from jaxood.errors import UserError
from jaxood.stages import STAGES, score, train_restorer
from jaxood.stages.parts import networks

CONFIG = 'configs/dlsr.py'


def small(variant='digits', **changes):
    """A variant with a tiny backbone and restorers of a few steps; `changes` as a__b=value."""
    c = main.load_config(f'{CONFIG}:{variant}')
    c.seeds = (0,)
    c.parallel.num_devices = 1
    c.backbone.widths = (4, 8)
    c.detector.update(steps=12, batch_size=16)
    c.restorer.update(width=8, num_blocks=1, epochs=3, batch_size=64)
    c.report.update(draws=20, tsne=False)
    for path, value in changes.items():
        *sections, key = path.split('__')
        place = c
        for section in sections:
            place = place[section]
        with place.unlocked():
            place[key] = value
    return c


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dlsr')
    arms = dict(all={}, last=dict(restorer=dict(last=1)))
    config = small(arms=arms, report__arm='all')
    with config.unlocked():
        config.scores.mse_t9 = dict(name='mse', depth=9)
        del config.scores.mfsim_skip
    main.execute(config, str(folder))
    return folder, config


@pytest.fixture(autouse=True)
def _forgotten():
    """Flags outlive a call of `predict`, which a process makes only once."""
    yield
    for name in predict.FLAGS:
        predict.FLAGS[name].unparse()


def rows_of(folder):
    with open(folder / 'results.csv') as f:
        rows = list(csv.DictReader(f))
    return {(r['run_id'], r['method'], r['ood_dataset']): r for r in rows}


def test_restorers_share_what_the_network_says(finished):
    """Two arms, one network: each set passes through it once, and the restorers are two."""
    folder, config = finished
    count = lambda stage: len(list((folder / 'artefacts' / stage).iterdir()))
    assert count('train_detector') == 1
    assert count('train_restorer') == 2
    assert count('features') == 5  # train, test, validation, held_out, photos
    assert count('restorations') == 2 * 4 * 2  # arms, sets that are scored, depths
    index = json.loads((folder / 'runs.json').read_text())
    for arm, edges in (('all', [0, 4, 12]), ('last', [0, 8])):
        done = json.loads((folder / index[arm]['0']['train_restorer'] / 'done.json').read_text())
        assert done['edges'] == edges
        assert (folder / index[arm]['0']['train_restorer'] / 'initial').exists()


def test_scores_stand_beside_each_other(finished):
    folder, config = finished
    rows = rows_of(folder)
    for arm in ('all', 'last'):
        assert {m for a, m, _ in rows if a == f'{arm}/0'} == {*config.scores}
    assert rows['all/0', 'knn_taps', 'photos'] != rows['all/0', 'knn', 'photos']
    same = lambda m: [rows[f'{arm}/0', m, 'photos']['auroc'] for arm in ('all', 'last')]
    assert len({*same('msp')}) == 1  # of the same network
    assert len({*same('mse')}) == 2
    assert 'features restored by lfdn' in rows['all/0', 'mse', 'photos']['training']
    page = (folder / 'report.html').read_text()
    assert 'has learned the 7 ID classes from their labels' in page
    assert 'after the first epoch' in page
    assert 'mean AUROC, % over depth t' in page


def test_a_second_run_redoes_nothing_and_a_new_depth_costs_that_depth(finished, monkeypatch):
    folder, config = finished
    before = {p: p.stat().st_mtime_ns for p in folder.glob('artefacts/*/*/*')}
    main.execute(config, str(folder))
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob('artefacts/*/*/*')}
    other = small(arms=config.arms, report__arm='all', artefacts_dir=str(folder / 'artefacts'))
    with other.unlocked():
        other.scores = dict(config.scores, mse_t5=dict(name='mse', depth=5))
    monkeypatch.setattr(networks.Network, 'stream', None)  # any pass of the network would fail
    monkeypatch.setattr(train_restorer, 'run', None)
    runs = experiment.check(other)
    assert [run.arm for run in runs] == ['all', 'last']
    main.execute(other, str(folder / 'other'), only=['score', 'report'])
    assert ('all/0', 'mse_t5', 'photos') in rows_of(folder / 'other')


def test_predict_scores_an_image_as_the_run_did(finished, tmp_path, capsys):
    """The noise follows from the pixels: the score of an image is the same wherever it stands."""
    folder, config = finished
    data = score.common.load_data(config).id.validation
    for i in range(5):
        Image.fromarray(data.images[i][..., 0]).save(tmp_path / f'{i}.png')
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    words = [f'--workdir={folder}', '--score=mse', '--batch=3', str(tmp_path)]
    assert predict.main(['predict', *words]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert rows[-1]['decision'] == 'error'
    index = json.loads((folder / 'runs.json').read_text())
    known = np.load(folder / index['all']['0']['score'] / 'mse' / 'validation.npz')['score']
    got = [float(row['score']) for row in rows[:-1]]
    np.testing.assert_allclose(got, known[:5], rtol=1e-4)
    assert all(row['decision'] in ('ID', 'OOD') for row in rows[:-1])


def test_a_missing_snapshot_is_named(finished, tmp_path):
    folder, config = finished
    shutil.copytree(folder, tmp_path / 'run')
    index = json.loads((folder / 'runs.json').read_text())
    shutil.rmtree(tmp_path / 'run' / index['all']['0']['train_restorer'] / 'initial')
    (tmp_path / 'a.png').write_bytes(b'')
    with pytest.raises(UserError, match='initial is missing: the snapshot .*first epoch'):
        predict.execute(
            str(tmp_path / 'run'),
            [str(tmp_path / 'a.png')],
            'csv',
            None,
            dict(arm=None, seed=None, score='lr', keep=0.95, on_error='skip', batch=4),
        )


@pytest.mark.slow
def test_pixels_are_restored_beside_features(tmp_path):
    c = small('digits,pixels')
    c.generator.update(channels=8, multipliers=(1,), attention_sizes=())
    c.diffusion.update(steps=4, batch_size=16)
    c.diffusion.optimizer.warmup = 1
    c.pixels.update(count=6, steps=8, every=2, batch_size=8)
    c.pixels.single = 4
    main.execute(c, str(tmp_path))
    summary = json.loads((tmp_path / 'results.json').read_text())['summary']
    found = summary['sections']['pixels']
    assert found['counts'] == {'test': 6, 'held_out': 6, 'photos': 6}
    assert found['pace']['calls'] == 2 + 4 + 6
    rows = found['rows']
    assert rows['pixels, 3 depths']['images_per_s'] < rows['pixels, one depth']['images_per_s']
    ratio = rows['mse']['images_per_s'] / rows['pixels, 3 depths']['images_per_s']
    assert rows['pixels, 3 depths']['ratio'] == pytest.approx(ratio)
    assert set(found['differences']) == {'mfsim - pixels, 3 depths', 'mfsim - pixels, one depth'}
    assert 'Features against pixels' in (tmp_path / 'report.html').read_text()


@pytest.mark.slow
def test_pictures_of_ones_own(tmp_path, capsys):
    """`:folder` trains on a folder without labels, over a network of other classes; `predict` then
    sorts another folder."""
    path, _, _ = tiny.weights(tmp_path / 'net', look=tiny.LOOK)
    rng = np.random.default_rng(0)
    for kind, low in (('mine/a', 0), ('mine/b', 0), ('other', 128)):
        (tmp_path / kind).mkdir(parents=True)
        for i in range(40 if low == 0 else 5):
            pixels = rng.integers(low, low + 128, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f'{i}.png')
    c = main.load_config(f'{CONFIG}:folder')
    c.weights, c.data.id.path = path, str(tmp_path / 'mine')
    c.data.update(size=8, channels=1)
    c.data.ood.outside.count = 30
    c.restorer.update(width=8, num_blocks=1, epochs=2, batch_size=16)
    c.report.update(draws=20, tsne=False)
    c.scores.knn.k = c.scores.knn_taps.k = 5
    main.execute(c, str(tmp_path / 'run'))
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert 'without labels' in page
    assert 'no label of the ID set was used' in page
    capsys.readouterr()
    assert predict.main(['predict', f'--workdir={tmp_path}/run', str(tmp_path / 'other')]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 5
    assert {row['decision'] for row in rows} <= {'ID', 'OOD'}


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(taps__at=('conv0', 'cnv1')), r"config\.taps\.at.*'cnv1'.*Known: conv0, conv1"),
        (dict(taps__pool='max'), r"config\.taps\.pool='max'.*Known: avg, grid16"),
        (dict(scores__mse__depth=0), r'config\.scores\.mse\.depth=0 .* in 1\.\.100'),
        (dict(scores__lr__depth=101), r'config\.scores\.lr\.depth=101 .* in 1\.\.100'),
        (dict(scores__mse_first__snapshot='lst'), r"snapshot='lst' must be one of"),
        (dict(restorer__epochs=1), r'config\.scores\.lr .*one of these snapshots is missing'),
        (dict(restorer__last=1), r'mfsim_skip\.skip_first leaves out the only block'),
        (dict(restorer__last=3), r'config\.restorer\.last=3 .* at most 2'),
        (dict(restorer__name='lfnd'), r"config\.restorer\.name='lfnd'.*Did you mean 'lfdn'"),
        (dict(restorer__batch_size=4000), r'config\.restorer\.batch_size=4000 is more than'),
        (dict(restoration__eta=1.5), r'config\.restoration\.eta=1\.5'),
        (dict(restoration__stride=0), r'config\.restoration\.stride=0'),
        (dict(scores__msp__on='taps'), r"config\.scores\.msp\.on='taps': leave it unset"),
        (dict(stages=('train_detector', 'score', 'report')), r'this run trains none'),
        (
            dict(preprocessing__size=4, backbone__widths=(4, 8, 8, 8)),
            r"4 x 4 pixels, fewer than the stride 8 of its map 'conv3'",
        ),
        (dict(preprocessing__size=0), r'config\.preprocessing\.size=0 must be a whole number'),
    ],
)
def test_what_it_refuses(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        main.execute(small(**changes), str(tmp_path))
    assert not list(tmp_path.glob('artefacts/*/*/done.json'))


def test_pixels_are_told_no_class(tmp_path):
    c = small('digits,pixels')
    c.diffusion.label_dropout = 0.1
    with pytest.raises(UserError, match=r"'reconstruct_pixels', whose diffusion model is told no"):
        main.execute(c, str(tmp_path))
    c = small('digits,pixels')
    c.pixels.single = 27
    with pytest.raises(UserError, match=r'config\.pixels\.single=27 is none of the chains'):
        main.execute(c, str(tmp_path))
    c = small('digits,pixels')
    c.data.ood.photos.size, c.preprocessing.size = 16, 8
    with pytest.raises(UserError, match=r'photos has images of shape \(16, 16, 1\), and a diff'):
        main.execute(c, str(tmp_path))


def test_a_pretrained_network_lists_its_taps():
    resnet_56 = dict(name='resnet', blocks=(9, 9, 9), width=16, shortcut='pad')
    with pytest.raises(UserError, match="'layer4' of 'resnet'.*Known: layer1, layer2, layer3"):
        networks.tap(resnet_56, dict(at=('layer3', 'layer4'), pool='avg'))


def test_every_variant_and_ablation_reads():
    for variant in ('digits', 'cifar10', 'cifar100', 'celeba', 'imagenet100', 'folder'):
        c = main.load_config(f'{CONFIG}:{variant}')
        assert c.report.score in c.scores
        assert c.report.arm in c.arms
    for word in ('depth', 'width', 'blocks', 'last', 'resize', 'pixels'):
        for variant in (f'digits,{word}', f'cifar10,full,{word}'):
            c = main.load_config(f'{CONFIG}:{variant}')
            assert c.report.score in c.scores
            assert c.report.arm in c.arms
            assert set(c.stages) <= set(STAGES)
    c = main.load_config(f'{CONFIG}:cifar10,full,width')
    assert {arm.restorer.width for arm in c.arms.values()} == {1440, 720, 360}
    assert (c.preprocessing.size, c.restorer.epochs) == (224, 150)
    with pytest.raises(UserError, match=r"ablation 'widht'.*Did you mean 'width'"):
        main.load_config(f'{CONFIG}:digits,widht')
    with pytest.raises(UserError, match='one ablation at a time'):
        main.load_config(f'{CONFIG}:digits,width,depth')
