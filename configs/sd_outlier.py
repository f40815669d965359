"""SD-outliers."""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = 'digits'):
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.seeds = (0, 1, 2)
    c.dtype = 'float32'
    c.stages = ('pseudo_label',)
    c.artefacts_dir = config_dict.placeholder(str)
    c.parallel = dict(mode='jit', num_devices=config_dict.placeholder(int), inference_batch=256)
    c.data = dict(
        root=config_dict.placeholder(str),
        on_error='stop',
        held_out=(),
        held_out_validation=(),
        device_limit=2**30,
        test=0.25,
    )
    c.data.update(size=8, channels=1, validation=0.15, held_out=(8, 9), held_out_validation=(5,))
    c.data.id = dict(name='digits')
    c.data.ood = dict(photos=dict(name='photos', count=1000))
    c.preprocessing = dict(mean=(0.3,), std=(0.38,))
    c.pseudo_label = dict(
        name='scan',
        classes=7,
        smallest=0.1,
        backbone=dict(name='cnn', widths=(32, 64, 64)),
        views=dict(
            contrast=dict(name='handwriting'),
            weak=dict(name='plain'),
            strong=dict(name='handwriting'),
        ),
        pretext=phase(400, 256, 1e-3, temperature=0.1),
        clustering=phase(200, 256, 1e-3, neighbours=10, entropy_weight=5.0),
        self_labelling=phase(100, 256, 1e-3, threshold=0.95),
    )
    return c


def phase(steps, batch_size, lr, **more):
    optimizer = dict(name='adam', learning_rate=lr, weight_decay=1e-4)
    return dict(
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        log_every=50,
        checkpoint_every=1000,
        **more,
    )
