"""A tiny pipeline that knows CIFAR-10's class names, untrained, with its CLIP; a config that asks
it for words."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from ml_collections import config_dict

from jaxood.models.clip import tokenizer
from jaxood.models.components import COMPONENTS
from jaxood.models.stable_diffusion import fresh

CLASSES = (
    *('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
)
SYNSETS = """\
synset\tlexname\tmembers\thypernyms\tkind
1\tanimal\tanimal|beast\t\tc
2\tanimal\tcanine|canid\t1\tc
3\tanimal\tdog|domestic dog\t2\tc
4\tanimal\tpuppy\t3\tc
5\tanimal\tPug\t4\tc
6\tanimal\twolf\t2\tc
7\tanimal\tcat|true cat\t1\tc
8\tperson\tchap|dog\t\tc
9\tartifact\tairplane|aeroplane|plane\t10\tc
10\tartifact\theavier-than-air craft\t\tc
11\tartifact\tkite\t10\tc
12\tanimal\tlawn mower|Fido\t3\ti
13\tartifact\tdevice\t\tc
14\tartifact\tbicycle|bike\t13\tc
15\tartifact\tballoon\t13\tc
16\tanimal\tcamel\t1\tc
17\tartifact\ttable\t13\tc
"""
SIZES = dict(width=8, layers=1, heads=2, projection=6)


@functools.cache
def pipeline() -> pathlib.Path:
    """A folder, made once for all tests of a process; they leave it as it is."""
    place = pathlib.Path(tempfile.mkdtemp())
    words = tokenizer.learn([f'a photo of a {name}' for name in CLASSES])
    text = fresh.text_config(vocab_size=len(words[0]), positions=77, **SIZES)
    vision = fresh.vision_config(size=8, patch=4, image_channels=3, **SIZES)
    described = {
        'text_encoder': text,
        'clip': fresh.clip_config(text, vision),
        'vae': fresh.vae_config(size=8, image_channels=3, channels=(4, 4), layers=1, groups=2),
        'unet': fresh.unet_config(size=4, channels=(4,), layers=1, heads=2, groups=2, width=8),
    }
    params = {'clip': _random('clip', described, words)}
    params |= {k: _random(k, described, words) for k in ('unet', 'vae')}
    own = params['clip']['text']
    params['text_encoder'] = {k: v for k, v in own.items() if k != 'text_projection'}
    fresh.write(place, described, params, words, length=77)
    return place


def _random(name, described, words):
    """Parameters of order 1 in effect, without a compilation."""
    modules = COMPONENTS[name].build(described[name])
    image, ids = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 2), jnp.int32)
    inputs = {'text': (ids,), 'vision': (image,), '': (image,)}
    if name == 'unet':
        inputs = {'': (jnp.zeros((1, 4, 4, 4)), jnp.ones(1, jnp.int32), jnp.zeros((1, 2, 8)))}
    draw = np.random.RandomState(len(name))

    def of(path, leaf):
        kind = path[-1].key
        x = draw.standard_normal(leaf.shape).astype(np.float32)
        if kind == 'scale':
            return 1.0 + 0.1 * x
        return x * (0.1 if leaf.ndim < 2 else np.prod(leaf.shape[:-1]) ** -0.5)

    made = {
        key: jax.tree_util.tree_map_with_path(
            of, jax.eval_shape(module.init, jax.random.key(0), *inputs[key])['params']
        )
        for key, module in modules.items()
    }
    return made | {'logit_scale': np.float32(2.0)} if name == 'clip' else made['']


def images(folder: pathlib.Path, classes=CLASSES) -> str:
    """Writes noise, a little different for each class, as an NPZ file of 8 images a class."""
    draw = np.random.RandomState(0)
    labels = np.repeat(np.arange(len(classes)), 8)
    levels = 20 * labels[:, None, None, None] + draw.randint(0, 60, (len(labels), 8, 8, 3))
    names = np.array(classes)
    np.savez(folder / 'id.npz', images=levels.astype(np.uint8), labels=labels, class_names=names)
    return str(folder / 'id.npz')


def config(folder: pathlib.Path, classes=CLASSES, **changes):
    """Asks for the words of these classes; `changes` as a__b=value."""
    table = folder / 'synsets.tsv'
    table.write_text(SYNSETS)
    c = ml_collections.ConfigDict()
    c.seed, c.seeds, c.dtype = 0, (0,), 'float32'
    c.stages = ('learn_tokens', 'words')
    c.artefacts_dir = config_dict.placeholder(str)
    c.parallel = dict(mode='jit', num_devices=1, inference_batch=64)
    c.data = dict(
        on_error='stop',
        channels=3,
        validation=0.125,
        test=0.125,
        device_limit=2**30,
        id=dict(name='npz', path=images(folder, classes)),
    )
    c.preprocessing = dict(mean=0.5, std=0.5)
    c.generator = dict(name='stable_diffusion', path=str(pipeline()))
    c.tokens = dict(
        name='inversion',
        names=(),
        names_file=config_dict.placeholder(str),
        initial='name',
        templates='plain',
        per_class=config_dict.placeholder(int),
        draw=True,
        flip=True,
        steps=6,
        batch_size=4,
        optimizer=dict(name='adam', learning_rate=5e-3),
        at_once=len(classes),
        remat=False,
        log_every=2,
        checkpoint_every=2,
    )
    c.words = dict(
        name='wordnet',
        path=str(table),
        clip=config_dict.placeholder(str),
        template='a photo of a {}',
        k=4,
        rule='near',
        eta=0.05,
        threshold=config_dict.placeholder(float),
        keep=0.5,
        collisions=True,
    )
    for path, value in changes.items():
        *sections, key = path.split('__')
        section = functools.reduce(lambda at, name: at[name], sections, c)
        with section.unlocked():
            section[key] = value
    return c
