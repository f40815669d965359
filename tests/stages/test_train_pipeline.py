"""A small Stable Diffusion, cut down so that it takes seconds of steps: what it leaves behind."""

import importlib.util
import json

import jax
import numpy as np
import pytest
import tiny

from jaxood import main
from jaxood.data import augment
from jaxood.errors import ConfigError, UserError
from jaxood.models.stable_diffusion import folder as folders
from jaxood.stages import common, train_pipeline
from jaxood.train import loop


def config(variant='digits', **changes):
    """A variant of `configs/small_sd.py` cut down; `changes` as a__b=value."""
    spec = importlib.util.spec_from_file_location('small_sd', tiny.CONFIGS / 'small_sd.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(variant)
    small = dict(positions=16, samples=1, sampling_steps=2)
    small |= {
        'clip__width': 8,
        'clip__layers': 1,
        'clip__heads': 2,
        'clip__projection': 8,
        'autoencoder__channels': (4,),
        'autoencoder__groups': 2,
        'unet__channels': (4,),
        'unet__heads': 2,
        'unet__groups': 2,
    }
    for part in train_pipeline.PARTS:
        at = f'{part}__training__'
        small |= {f'{at}steps': 4, f'{at}batch_size': 8, f'{at}optimizer__warmup': 0}
    for path, value in ({f'pipeline__{k}': v for k, v in small.items()} | changes).items():
        *sections, key = path.split('__')
        place = c
        for section in sections:
            place = place[section]
        with place.unlocked():
            place[key] = value
    return c


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    place = tmp_path_factory.mktemp('small_sd')
    main.execute(config(parallel__num_devices=1), str(place))
    return place


@pytest.mark.slow
def test_what_is_left_is_a_pipeline(workdir):
    sd = folders.load(workdir / 'pipeline')
    assert sd.size == 8
    assert sd.tokenizer.length == 16
    (row,) = sd.tokenizer(['a photo of a three over a seven'])
    assert list(row).count(sd.tokenizer.pad) == 16 - 1 - 8  # every word is one token
    latents = sd.networks.vae.apply(
        sd.params['vae'], augment.to_unit(_images(config())), method='encode'
    )[0]
    assert abs(sd.networks.vae.scale * np.std(latents) - 1.0) < 0.05
    found = json.loads((workdir / 'samples.json').read_text())
    assert len(found['read_as_asked_each']) == 8
    assert found['reader_accuracy'] > 0.95
    assert (workdir / 'samples.png').read_bytes().startswith(b'\x89PNG')


def _images(c):
    return common.load_data(c).id.train.images[:500]


@pytest.mark.slow
def test_its_clip_has_the_same_text_encoder(workdir):
    sd, clip = folders.load(workdir / 'pipeline'), folders.load_clip(workdir / 'pipeline' / 'clip')
    ids = sd.tokenizer(['a photo of a two'])
    np.testing.assert_array_equal(clip.tokenizer(['a photo of a two']), ids)
    ours = sd.networks.text.apply(sd.params['text_encoder'], ids)
    theirs = clip.text.apply(clip.params['text'], ids)
    np.testing.assert_array_equal(ours['hidden'], theirs['hidden'])
    assert theirs['projected'].shape == (1, 8)
    pixels = jax.numpy.zeros((1, 8, 8, 3))
    assert clip.vision.apply(clip.params['vision'], pixels)['projected'].shape == (1, 8)


@pytest.mark.slow
def test_parts_that_were_trained_are_not_trained_again(workdir, monkeypatch):
    """An interrupted run goes on with the part it was at, and ends with the same pipeline."""
    (artefact,) = (workdir / 'artefacts' / 'train_pipeline').iterdir()
    weights = artefact / 'pipeline' / 'unet' / 'diffusion_pytorch_model.safetensors'
    before = weights.read_bytes()
    (artefact / 'done.json').unlink()
    (artefact / 'unet' / 'facts.json').unlink()
    fit, trained = loop.fit, []

    def counted(*args, what, **keywords):
        trained.append(what.split()[0])
        return fit(*args, what=what, **keywords)

    monkeypatch.setattr(loop, 'fit', counted)
    main.execute(config(parallel__num_devices=1), str(workdir))
    assert trained == ['unet']
    assert weights.read_bytes() == before


def test_the_digits_8_and_9_are_never_shown():
    data = common.load_data(config())
    assert set(data.id.train.labels) == set(range(8))
    texts = train_pipeline.texts(config(), data)
    assert texts[3] == 'a photo of a three'
    assert len(texts) == (4 + 8) * 8
    assert not [text for text in texts if 'eight' in text or 'nine' in text]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(pipeline__template='a photo'), r"template='a photo' must have one \{\}"),
        (dict(pipeline__plain=1.5), r'config\.pipeline\.plain=1\.5 must be a number, between'),
        (dict(pipeline__unet__training__steps=0), r'config\.pipeline\.unet\.training\.steps=0'),
        (dict(pipeline__positon=3), r"pipeline\.positon is not known. Did you mean 'positions'"),
    ],
)
def test_settings_that_cannot_work(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        main.execute(config(**changes), str(tmp_path))
    assert not (tmp_path / 'artefacts').exists()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(data__channels=1), r'8 x 8 pixels and 1 channels\. They must be square'),
        (dict(data__size=9, pipeline__autoencoder__channels=(4, 8)), r'9 x 9 pixels'),
        (dict(data__device_limit=1000), r'config\.data\.device_limit: the images must fit'),
        (dict(pipeline__names=('a', 'b')), r'names has 2 names for 8 classes'),
        (dict(pipeline__clip__training__batch_size=5000), r'clip\.training\.batch_size=5000 is'),
        (dict(pipeline__clip__heads=3), r'hidden_size=8, which its 3 heads do not divide'),
        (dict(pipeline__unet__groups=3), r'4 channels do not divide into 3 groups'),
    ],
)
def test_settings_that_do_not_suit_the_images(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main.execute(config(parallel__num_devices=1, **changes), str(tmp_path))
    assert not list(tmp_path.glob('artefacts/*/*/*'))
