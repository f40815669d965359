"""Detectors that begin with given weights, keep some of them, and see images enlarged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from jaxood import main
from jaxood.errors import UserError
from jaxood.models import Classifier
from jaxood.models.backbones import ViT
from jaxood.models.heads import ThreeHeads
from jaxood.stages.parts import classifiers
from jaxood.train import checkpoint, loop, state

VIT = ViT(size=16, patch=4, width=8, depth=3, heads=2, mlp=16)


def test_frozen_blocks_stay_and_cost_no_gradient():
    """Two blocks of a ViT that sees 8 pixels at 16: weight decay leaves them alone too."""
    model = Classifier(VIT, ThreeHeads(3))
    stays = VIT.first(2)
    assert stays == ('patches', 'class_token', 'positions', 'block0', 'block1')
    look = (('mean', (0.5,)), ('std', (0.5,)), ('size', 16))
    loss = classifiers._loss(model, 'three_head', (('weight', 0.5),), stays, 0, False, 0.0, look)
    tx = classifiers.thaw(state.sgd(steps=2, learning_rate=0.1, weight_decay=0.1), stays)
    variables = jax.jit(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)), train=False)
    )
    params = variables()['params']
    images = np.random.default_rng(0).integers(256, size=(6, 8, 8, 1)).astype(np.uint8)
    data = {'image': images, 'label': np.arange(6, dtype=np.int32) % 3}
    data |= {'outlier_image': images[::-1], 'outlier_label': np.zeros(6, np.int32)}
    batch = {'index': np.arange(4), 'outlier_index': np.arange(4)}
    step = jax.jit(
        lambda s: loop.train_step(s, data, batch, jax.random.key(1), loss_fn=loss, tx=tx)
    )
    after, _ = step(state.create(params, tx, {}, ema=False))
    for name, before in params['backbone'].items():
        moved = jax.tree.map(
            lambda x, y: bool((x != y).any()), before, after.params['backbone'][name]
        )
        assert any(jax.tree.leaves(moved)) == (name not in stays), name
    grads = jax.grad(lambda p: loss(p, {}, data, batch, jax.random.key(1), 0)[0])(params)
    assert not any(
        np.asarray(x).any() for k in stays for x in jax.tree.leaves(grads['backbone'][k])
    )
    assert all(np.asarray(x).any() for x in jax.tree.leaves(grads['backbone']['block2']['fc1']))


def test_first_blocks_are_counted():
    assert VIT.first(0) == ()
    with pytest.raises(UserError, match='number=4: this ViT has 3 blocks'):
        VIT.first(4)


def config(path, **changes):
    arms = dict(main=dict(outliers=dict(name='none'), detector=dict(name='untrained')))
    c = tiny.config(
        arms=arms,
        report__arm='main',
        stages=('train_detector', 'score', 'report'),
        scores=dict(knn=dict(k=3)),
        report__score='knn',
        **changes,
    )
    with c.unlocked():
        c.weights = path
        c.detector.init = 'weights'
        c.preprocessing.size = 12
    return c


def test_a_detector_begins_with_converted_weights_on_enlarged_images(tmp_path):
    path, model, variables = tiny.weights(tmp_path / 'net')
    main.execute(config(path), str(tmp_path / 'run'))
    runs = json.loads((tmp_path / 'run/runs.json').read_text())['main']['0']
    folder = tmp_path / 'run' / runs['train_detector']
    weights = checkpoint.load_weights(epath.Path(folder / 'weights'))
    jax.tree.map(np.testing.assert_array_equal, weights, variables)  # its head is theirs, too
    facts = json.loads((folder / 'done.json').read_text())
    assert facts['preprocessing']['size'] == 12
    assert 'weights' in json.loads((tmp_path / 'run/repro.json').read_text())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c.update(weights=None), r'config\.weights names no checkpoint'),
        (lambda c: c.backbone.update(base=8), r'wrn \(depth=10, width=1, base=4\).*Make them the'),
        (
            lambda c: c.detector.update(init='pseudo_label'),
            r'takes the network of config\.pseudo_l',
        ),
        (
            lambda c: c.preprocessing.update(size=0),
            r'config\.preprocessing\.size=0 must be a whole',
        ),
    ],
)
def test_what_it_refuses(tmp_path, change, message):
    c = config(tiny.weights(tmp_path / 'net')[0])
    with c.unlocked():
        change(c)
    with pytest.raises(UserError, match=message):
        main.execute(c, str(tmp_path / 'run'))
