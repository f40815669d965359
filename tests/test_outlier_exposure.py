"""`configs/outlier_exposure.py`, cut down: one classifier, fine-tuned by every method on the same
given images."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

from jaxood import artefacts, main
from jaxood import config as configs
from jaxood.data import augment
from jaxood.errors import UserError
from jaxood.models import Classifier
from jaxood.models.backbones import CNN
from jaxood.models.heads import Linear
from jaxood.stages import common, synthesise
from jaxood.train import checkpoint

CONFIG = 'configs/outlier_exposure.py'
ARMS = ('none', 'energy_oe', 'doe')


def cut(variant='digits', arms=ARMS, **changes):
    c = main.load_config(f'{CONFIG}:{variant}')
    c.seeds = (0,)
    c.outliers.source.count = c.outliers.count = 40
    c.parallel.num_devices = 1
    c.pretraining.update(steps=8, batch_size=32, log_every=4)
    c.detector.update(steps=4, batch_size=16, log_every=2)
    c.report.update(draws=20, gallery=8, tsne=False)
    with c.unlocked():
        c.backbone = dict(name='cnn', widths=(4, 24))
        c.arms = {arm: c.arms[arm] for arm in arms}
        for path, value in changes.items():
            section, _, key = path.rpartition('__')
            place = c
            for name in section.split('__') if section else ():
                place = place[name]
            place[key] = value
    return c


def config_of(arm):
    return next(run.config for run in configs.runs(cut()) if run.arm == arm)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('outlier_exposure')
    main.execute(cut(), str(folder))
    return folder


def place(finished, arm, stage):
    index = json.loads((finished / 'runs.json').read_text())
    return epath.Path(finished / index[arm]['0'][stage])


def weights(finished, arm, stage='train_detector'):
    return checkpoint.load_weights(place(finished, arm, stage) / 'weights')


def test_all_arms_go_on_from_one_classifier(finished):
    assert len(list((finished / 'artefacts/pretrain_detector').iterdir())) == 1
    begun = weights(finished, 'doe', 'pretrain_detector')
    jax.tree.map(np.testing.assert_array_equal, weights(finished, 'none'), begun)
    kernels = [weights(finished, arm)['params']['head']['kernel'] for arm in ARMS]
    for i, kernel in enumerate(kernels):
        near = np.linalg.norm(kernel - kernels[0]) / np.linalg.norm(kernels[0])
        assert (i > 0) == (near > 1e-6)
        assert near < 0.2  # four steps from there, not from random weights
        assert all((kernel != other).any() for other in kernels[:i])


def test_the_perturbation_ends_with_the_training(finished):
    assert set(weights(finished, 'doe')) == {'params', 'batch_stats'}


def test_the_network_as_it_begins_is_a_classifier_with_an_accuracy(finished):
    """No training of its own, and the pretrained one's logits; so the report can compare it."""
    data = common.load_data(config_of('none'))
    model = Classifier(CNN(widths=(4, 24)), Linear(7))
    x = augment.standardise(data.id.test.images, (0.3,), (0.38,))
    logits = model.apply(weights(finished, 'doe', 'pretrain_detector'), x, train=False)['logits']
    done = json.loads((place(finished, 'none', 'score') / 'done.json').read_text())
    accuracy = float(np.mean(np.argmax(logits, -1) == data.id.test.labels))
    assert done['id_accuracy'] == pytest.approx(accuracy, abs=1e-5)
    cells = json.loads((finished / 'results.json').read_text())['summary']['cells']
    assert set(cells) == set(ARMS)


def test_index_says_which_image_each_outlier_is(finished):
    folder = place(finished, 'doe', 'synthesise')
    index = [json.loads(line) for line in (folder / 'index.jsonl').read_text().splitlines()]
    made = artefacts.load(folder / 'outliers.npz')['images']
    given = synthesise.given(config_of('doe')).images
    order = [line['of_given'] for line in index]
    assert sorted(order) == list(range(40)) != order
    np.testing.assert_array_equal(made, given[order])


# ---- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(detector__sign='plus'), r"config\.detector: sign 'plus' is not known"),
        (dict(detector__name='doe_joint'), r"config\.detector\.name='doe_joint' is not known"),
        (dict(detector__warmup=-3), r'config\.detector: warmup=-3 steps'),
        (dict(detector__accumulate=0), r'config\.detector\.accumulate=0 must be a whole number'),
        (dict(detector__accumulate=3), r'32 rows cannot be split over 1 devices and 3 parts'),
        (dict(outliers__count=41), r'outliers\.source has 40 images, but config\.outliers\.count='),
        (dict(outliers__source=None), r'config\.outliers\.source names none'),
        (dict(pretraining__name='oe'), r"config\.pretraining\.name='oe': this training sees ID"),
        (dict(pretraining__init='weights'), r"config\.pretraining\.init='weights': it begins at"),
        (dict(stages=('synthesise', 'train_detector', 'score', 'report')), "'pretrain_detector'"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        main.execute(cut(arms=('doe',), **changes), str(tmp_path))
    assert not (tmp_path / 'artefacts').exists()


def test_weights_of_other_classes_or_without_a_look(tmp_path):
    path, *_ = tiny.weights(tmp_path / 'net', num_classes=4)
    config = cut(arms=('doe',), weights=path, detector__init='weights', backbone=tiny.BACKBONE)
    with pytest.raises(UserError, match='classifies 4 classes, the ID set has 7'):
        main.execute(config, str(tmp_path / 'run'))
    with config.unlocked():
        config.preprocessing.mean = None
    with pytest.raises(UserError, match=r'preprocessing\.mean is not set.*images with \(0\.3,\)'):
        main.execute(config, str(tmp_path / 'run'))


def test_folders_of_outliers(tmp_path):
    """Pictures of another size, an empty folder, one that is cut short; and then none of these."""
    folder = tmp_path / 'pictures'
    folder.mkdir()
    section = dict(name='folder', path=str(folder))
    config = cut(arms=('doe',), outliers__source=section, outliers__count=3)
    config.detector.update(outlier_ratio=0.125)

    def refused(message):
        with pytest.raises(UserError, match=message):
            main.execute(config, str(tmp_path / 'run'), ['synthesise'])

    refused(r'config\.outliers\.source: .*holds no images')
    pixels = np.random.default_rng(0).integers(256, size=(3, 12, 9, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f'{i}.png')
    shutil.copy(folder / '2.png', tmp_path / 'whole.png')
    (folder / '2.png').write_bytes((folder / '2.png').read_bytes()[:150])
    refused(r'config\.outliers\.source: .*2\.png cannot be read')
    shutil.copy(tmp_path / 'whole.png', folder / '2.png')
    main.execute(config, str(tmp_path / 'run'), ['synthesise'])
    [index] = (tmp_path / 'run/artefacts/synthesise').glob('*/index.jsonl')
    files = [json.loads(line)['file'] for line in index.read_text().splitlines()]
    assert sorted(files) == ['0.png', '1.png', '2.png']


@pytest.mark.parametrize('network', ['wrn', 'resnet20', 'resnet56', 'densenet'])
def test_networks_are_named_in_words(network):
    config = main.load_config(f'{CONFIG}:cifar10,{network}')
    assert (config.detector.init == 'pretrained') == ('pretrain_detector' in config.stages)
    assert config.detector.warmup == config.detector.steps // 2 == 1910
    config.detector.steps = 40
    assert config.arms.doe_released.detector.warmup == 20


def test_variants_that_are_not_there():
    for variant, message in (
        ('cifar11', "Did you mean 'cifar10'"),
        ('cifar10,resnet21', "Did you mean 'resnet20'"),
        ('digits,wrn', 'only cifar10 has a choice of networks'),
    ):
        with pytest.raises(UserError, match=message):
            main.load_config(f'{CONFIG}:{variant}')
