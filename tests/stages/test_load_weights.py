"""A pretrained network in place of a trained one."""

import csv
import json
import shutil

import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

from jaxood import artefacts, main, metrics
from jaxood.data import augment
from jaxood.errors import ConfigError, UserError
from jaxood.models.layouts import Preprocessing
from jaxood.stages import common


def benchmark(*paths, **changes):
    """The digits, under pretrained networks and no arms of their own."""
    config = tiny.config(
        stages=('load_weights', 'score', 'report'),
        weights=','.join(paths) or None,
        preprocessing=dict(mean=None, std=None),
        scores=dict(msp={}),
        arms={},
        report__arm=None,
        **changes,
    )
    for section in ('generator', 'diffusion', 'sampler', 'outliers', 'filter', 'detector', 'head'):
        del config[section]
    return config


def test_a_pretrained_network_is_scored_as_it_computes(tmp_path):
    path, model, variables = tiny.weights(tmp_path / 'net')
    config = benchmark(path)
    main.execute(config, str(tmp_path / 'run'))
    data = common.load_data(config)
    x = augment.standardise(data.id.test.images, tiny.LOOK.mean, tiny.LOOK.std)
    logits = model.apply(variables, x, train=False)['logits']
    with open(tmp_path / 'run' / 'results.csv') as f:
        rows = list(csv.DictReader(f))
    assert {row['run_id'] for row in rows} == {'net/0'}  # named after the folder
    accuracy = metrics.accuracy(logits.argmax(-1), data.id.test.labels)
    assert float(rows[0]['id_acc']) == pytest.approx(accuracy, abs=1e-6)
    assert rows[0]['training'] == 'pretrained (a test)'
    assert rows[0]['backbone'] == 'wrn base=4 depth=10 width=1'


def test_several_networks_are_arms_and_a_moved_one_is_the_same(tmp_path):
    first, second = (tiny.weights(tmp_path / n, seed=i)[0] for i, n in enumerate(('a', 'b')))
    store = str(tmp_path / 'store')
    main.execute(benchmark(first, second, artefacts_dir=store), str(tmp_path / 'one'))
    index = json.loads((tmp_path / 'one' / 'runs.json').read_text())
    assert list(index) == ['a', 'b']
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'store').glob('*/*/done.json')}
    moved = shutil.move(first, tmp_path / 'elsewhere')
    main.execute(benchmark(str(moved), artefacts_dir=store), str(tmp_path / 'two'))
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / 'store').glob('*/*/done.json')}
    assert before.items() <= after.items()
    assert {p.parts[-3] for p in after.keys() - before.keys()} == {'report'}


def test_the_config_overrides_the_normalisation(tmp_path):
    path, _, _ = tiny.weights(tmp_path / 'net')
    config = benchmark(path)
    config.preprocessing = dict(mean=(0.1,), std=None)
    main.execute(config, str(tmp_path / 'run'))
    index = json.loads((tmp_path / 'run' / 'runs.json').read_text())
    folder = epath.Path(tmp_path / 'run' / index['net']['0']['load_weights'])
    done = artefacts.Artefact('load_weights', '', folder).done
    assert done['preprocessing'] == {'mean': [0.1], 'std': [0.4]}


def test_weights_that_do_not_suit_the_images_are_refused(tmp_path):
    other = Preprocessing(32, 36, 'bicubic', (0.3,), (0.4,))
    cases = [
        (tiny.weights(tmp_path / 'few', num_classes=3)[0], ConfigError, 'classifies 3 classes'),
        (
            tiny.weights(tmp_path / 'big', look=other)[0],
            ConfigError,
            '--config.data.size=32 .*resize=36',
        ),
        (str(tmp_path / 'nowhere'), UserError, 'nowhere'),
    ]
    for path, error, message in cases:
        with pytest.raises(error, match=message):
            main.execute(benchmark(path), str(tmp_path / 'run'))
    assert not (tmp_path / 'run' / 'artefacts').exists()


def test_two_files_of_one_name_make_no_arms(tmp_path):
    path, _, _ = tiny.weights(tmp_path / 'net')
    with pytest.raises(ConfigError, match='share a name'):
        main.execute(benchmark(path, str(tmp_path / 'other' / 'net')), str(tmp_path / 'run'))
    with pytest.raises(ConfigError, match='config.weights is missing'):
        main.execute(benchmark(), str(tmp_path / 'run'))


def test_images_without_labels_are_scored_and_reported(tmp_path):
    """No stage here learns from classes, so a flat folder of images will do; nothing is said of
    accuracy, and what a network sees are class numbers."""
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    (tmp_path / 'flat').mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f'flat/{i:02d}.png')
    path, _, _ = tiny.weights(tmp_path / 'net')
    config = benchmark(path, data__held_out=(), data__held_out_validation=())
    with config.unlocked():
        config.data.id = dict(name='folder', path=str(tmp_path / 'flat'))
        config.scores = dict(msp={}, knn=dict(k=3))
    main.execute(config, str(tmp_path / 'run'))
    with open(tmp_path / 'run' / 'results.csv') as f:
        rows = list(csv.DictReader(f))
    assert {row['id_acc'] for row in rows} == {''}
    assert all(0.0 <= float(row['auroc']) <= 1.0 for row in rows)
    assert 'without labels' in (tmp_path / 'run' / 'report.html').read_text()
    places = json.loads((tmp_path / 'run' / 'runs.json').read_text())['net']['0']
    facts = json.loads((tmp_path / 'run' / places['score'] / 'done.json').read_text())
    assert facts['id_accuracy'] is None
    assert facts['class_names'] == ['0', '1', '2', '3', '4', '5', '6']


def test_held_out_classes_need_labels(tmp_path):
    np.savez(tmp_path / 'a.npz', images=np.zeros((60, 8, 8), np.uint8))
    config = benchmark(tiny.weights(tmp_path / 'net')[0])
    with config.unlocked():
        config.data.id = dict(name='npz', path=str(tmp_path / 'a.npz'))
    with pytest.raises(UserError, match=r'held_out=\(8, 9\) names classes, but .* no labels'):
        main.execute(config, str(tmp_path / 'run'))
