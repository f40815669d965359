"""SD-outliers (not measured yet)."""

import ml_collections
from ml_collections import config_dict

from jaxood.errors import lookup


def get_config(variant: str = 'digits'):
    """The config of a variant."""
    name, *words = variant.split(',')
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.seeds = (0, 1, 2)
    c.dtype = 'float32'
    c.stages = (
        *('pseudo_label', 'train_diffusion', 'synthesise', 'train_detector', 'score', 'report'),
    )
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
    c.filter = dict(name='none')
    c.head = dict(name='three')
    c.scores = dict(
        both=dict(name='votes', k=2, alpha=0.5),
        distance=dict(name='votes', k=2, alpha=0.0),
        votes=dict(name='votes', k=2, alpha=1.0, distance=0.0),
    )
    lookup(VARIANTS, name, 'variant')(c)
    return c


def digits(c):
    """The quickstart's digits and networks."""
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
    c.generator = dict(
        name='unet',
        channels=16,
        multipliers=(1, 2),
        num_blocks=1,
        attention_sizes=(4,),
        dropout=0.0,
    )
    c.diffusion = dict(
        schedule=dict(name='linear', num_steps=1000),
        prediction='eps',
        label_dropout=0.1,
        flip=False,
        steps=1500,
        batch_size=64,
        optimizer=dict(
            name='adam',
            learning_rate=1e-3,
            final_learning_rate=1e-5,
            warmup=50,
        ),
        ema_decay=0.9999,
        log_every=50,
        checkpoint_every=2000,
    )
    c.sampler = dict(name='ddpm', steps=1000, guidance=2.0)
    c.outliers = dict(
        name='semantic_discrepant',
        depth=100,
        same=0.0,
        per_image=1,
        shard_size=1024,
    )
    c.backbone = dict(name='wrn', depth=10, width=1, base=8, dropout=0.0)
    c.detector = dict(
        name='three_head',
        weight=0.5,
        outlier_ratio=1.0,
        steps=600,
        batch_size=64,
        crop=1,
        flip=False,
        noise=0.0,
        optimizer=dict(name='sgd', learning_rate=0.03, weight_decay=5e-4),
        log_every=200,
        checkpoint_every=2000,
    )
    c.arms = dict(
        ours=dict(),
        none=dict(outliers=dict(name='none'), detector=dict(name='plain')),
    )
    c.report = dict(
        title='SD-outliers, digits', arm='ours', score='both', draws=200, gallery=64, tsne=True
    )


def phase(steps, batch_size, learning_rate, **more):
    optimizer = dict(name='adam', learning_rate=learning_rate, weight_decay=1e-4)
    return dict(
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        log_every=50,
        checkpoint_every=1000,
        **more,
    )


VARIANTS = {'digits': digits}
