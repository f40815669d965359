"""The quickstart's config, cut down so that the whole chain takes seconds; a converted network."""

import importlib.util
import pathlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxood.models import Classifier, pretrained
from jaxood.models.backbones.wrn import WRN
from jaxood.models.heads import Linear
from jaxood.models.initial import compile_init
from jaxood.models.layouts import Preprocessing

BACKBONE = {'name': 'wrn', 'depth': 10, 'width': 1, 'base': 4}
LOOK = Preprocessing(8, None, 'bilinear', (0.3,), (0.4,))
CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


def config(variant='digits', **changes):
    """A variant of `configs/quickstart.py` cut down; `changes` as a__b=value."""
    spec = importlib.util.spec_from_file_location('quickstart', CONFIGS / 'quickstart.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(variant)
    tiny = {
        'seeds': (0,),
        'generator__channels': 8,
        'generator__multipliers': (1,),
        'generator__attention_sizes': (),
        'diffusion__steps': 12,
        'diffusion__batch_size': 16,
        'diffusion__optimizer__warmup': 2,
        'diffusion__log_every': 4,
        'diffusion__checkpoint_every': 4,
        'sampler': dict(name='dpmpp_2m', steps=3, guidance=0.0),
        'outliers': dict(name='label_mixup', count=40, max_candidates=2000, shard_size=24),
        'filter__quantile': 0.9,
        'filter__count': 2,
        'filter__backbone__widths': (4, 8),
        'filter__training__steps': 12,
        'filter__training__batch_size': 16,
        'backbone__base': 4,
        'detector__steps': 12,
        'detector__batch_size': 16,
        'detector__log_every': 4,
        'detector__checkpoint_every': 4,
        'parallel__num_devices': 1,
        'parallel__inference_batch': 64,
        'report__draws': 20,
        'report__gallery': 16,
        'report__tsne': False,
        'report__arm': 'diffusion',
        'arms': dict(
            none=dict(outliers=dict(name='none'), detector=dict(name='plain')),
            noise=dict(outliers=dict(name='uniform_noise')),
            diffusion=dict(),
        ),
    }
    for path, value in (tiny | changes).items():
        *sections, key = path.split('__')
        place = c
        for section in sections:
            place = place[section]
        with place.unlocked():
            place[key] = value
    return c


def weights(folder, num_classes=7, look=LOOK, seed=0):
    """A converted folder with an untrained network of 8 x 8 grey images."""
    model = Classifier(backbone=WRN(depth=10, width=1, base=4), head=Linear(num_classes))
    shape = (1, look.size, look.size, 1)
    init = compile_init(lambda key: model.init(key, np.zeros(shape), train=False))
    variables = jax.device_get(init(jax.random.key(seed)))
    digest = pretrained._digest(BACKBONE, flatten_dict(variables, sep='/'))
    found = pretrained.Pretrained(
        *(BACKBONE, {'name': 'linear'}, num_classes, look, variables, 'a test', digest)
    )
    pretrained.save(str(folder), found)
    return str(folder), model, variables
