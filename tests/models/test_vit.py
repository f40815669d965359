import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import make_vision

from jaxood.detectors import plain
from jaxood.errors import UserError
from jaxood.models import Classifier, pretrained
from jaxood.models.backbones import ViT, vit
from jaxood.models.backbones.vit import LAYOUTS
from jaxood.models.heads import Linear

NETWORKS = {k: v for k, v in make_vision.NETWORKS.items() if v[0] == 'vit'}
SOURCES = {  # the layout that has to recognise each
    'timm vit': 'timm',
    'transformers vit': 'transformers',
    'transformers 5 vit': 'transformers 5',
    'google vit': 'google-research/vision_transformer',
}
BASE = dict(size=224, width=768, depth=12, mlp=3072, classes=1000)


def ours(state):
    """(the conversion of a checkpoint, logits of make_vision's images)."""
    found = pretrained.convert(state)
    model = Classifier(found.build().backbone, Linear(make_vision.CLASSES))
    return found, model.apply(found.variables, make_vision.images('vit'), train=False)['logits']


@pytest.mark.parametrize('name', NETWORKS)
def test_logits_are_those_of_pytorch(name):
    """Each naming, recognised and converted; golden logits of the restatement in PyTorch."""
    _, shapes, hidden = NETWORKS[name]
    found, logits = ours(make_vision.arrays(shapes))
    assert found.source == SOURCES[name]
    shown = dict(size=224, patch=32, width=128, depth=2, mlp=40, fused=name == 'timm vit')
    assert found.backbone == {'name': 'vit'} | shown | hidden
    want = np.load(make_vision.LOGITS)[name]
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


if importlib.util.find_spec('torch'):

    @pytest.mark.parametrize('name', NETWORKS)
    def test_logits_are_those_of_pytorch_now(name):
        logits, want = ours(make_vision.arrays(NETWORKS[name][1]))[1], make_vision.logits(name)
        np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


if importlib.util.find_spec('torch') and importlib.util.find_spec('transformers'):

    def test_logits_are_those_of_transformers(tmp_path):
        """The names of its modules, and those of the file that it writes."""
        import torch
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            image_size=224,
            patch_size=32,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            num_labels=make_vision.CLASSES,
            initializer_range=0.2,
        )
        torch.manual_seed(0)
        net = ViTForImageClassification(config).eval()
        images = torch.from_numpy(make_vision.images('vit')).permute(0, 3, 1, 2)
        with torch.no_grad():
            want = net(images).logits.numpy()
        net.save_pretrained(tmp_path)
        state = {k: v.numpy() for k, v in net.state_dict().items()}
        for arrays in (state, pretrained.read(tmp_path / 'model.safetensors')):
            found, logits = ours(arrays)
            assert found.source.startswith('transformers')
            assert found.backbone['epsilon'] == config.layer_norm_eps
            np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_a_google_checkpoint_is_what_flax_makes_of_it():
    """The same arrays in Flax's own layers, which are the original's."""
    state = make_vision.arrays(make_vision.google_vit(**make_vision.VIT, heads=4))

    def layer(module, name, *x):
        start = f'{name}/'
        params = {k[len(start) :]: v for k, v in state.items() if k.startswith(start)}
        nested = {}
        for key, value in params.items():
            *parents, leaf = key.split('/')
            inner = nested
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[leaf] = value
        return module.apply({'params': nested}, *x)

    patches = nn.Conv(128, (32, 32), 32, padding='VALID')
    x = layer(patches, 'embedding', make_vision.images('vit')).reshape(2, 49, 128)
    x = jnp.concatenate([jnp.tile(state['cls'], (2, 1, 1)), x], axis=1)
    x = x + state['Transformer/posembed_input/pos_embedding']
    for i in range(2):
        block = f'Transformer/encoderblock_{i}'
        h = layer(nn.LayerNorm(), f'{block}/LayerNorm_0', x)
        attention = nn.MultiHeadDotProductAttention(num_heads=4)
        x = x + layer(attention, f'{block}/MultiHeadDotProductAttention_1', h, h)
        h = layer(nn.LayerNorm(), f'{block}/LayerNorm_2', x)
        h = nn.gelu(layer(nn.Dense(40), f'{block}/MlpBlock_3/Dense_0', h))
        x = x + layer(nn.Dense(128), f'{block}/MlpBlock_3/Dense_1', h)
    x = layer(nn.LayerNorm(), 'Transformer/encoder_norm', x)[:, 0]
    want = layer(nn.Dense(make_vision.CLASSES), 'head', x)
    logits = ours(state)[1]
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_vit_b_16_is_that_of_the_paper():
    model = Classifier(ViT(), Linear(1000))

    def run(key, images):
        variables = model.init(key, images, train=False)
        return variables, model.apply(variables, images, train=False)

    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    variables, outputs = jax.eval_shape(run, key, images)
    assert set(variables) == {'params'}
    assert sum(x.size for x in jax.tree.leaves(variables)) == 86_567_656
    assert outputs['features'].shape == (2, 768)
    assert [m.shape for m in outputs['maps']] == 12 * [(2, 14, 14, 768)]


def recognised(shapes):
    """(source, keywords) of all layouts that know these names."""
    found = [(layout.source, layout.recognise(shapes)) for layout in LAYOUTS]
    return [(source, keywords) for source, keywords in found if keywords is not None]


@pytest.mark.parametrize(
    ('patch', 'size', 'width', 'heads'),
    [
        (16, 224, 192, 3),
        (16, 224, 384, 6),
        (16, 384, 768, 12),
        (32, 224, 768, 12),
        (8, 224, 768, 12),
    ]
    + [(16, 224, 1024, 16), (14, 224, 1280, 16)],
    ids=['Ti/16', 'S/16', 'B/16 at 384', 'B/32', 'B/8', 'L/16', 'H/14'],
)
def test_every_size_is_recognised_by_its_shapes(patch, size, width, heads):
    plan = BASE | dict(patch=patch, size=size, width=width, mlp=4 * width)
    for make, sources in [
        (make_vision.timm_vit, ['timm', 'timm deit']),
        (make_vision.transformers_vit, ['transformers']),
        (make_vision.transformers_5_vit, ['transformers 5']),
    ]:
        found = recognised(make(**plan))
        assert [source for source, _ in found] == sources
        shown = dict(patch=patch, size=size, width=width, heads=heads, depth=12, mlp=4 * width)
        assert all(keywords.items() >= shown.items() for _, keywords in found)
    ((source, keywords),) = recognised(make_vision.google_vit(**plan, heads=heads))
    assert source == 'google-research/vision_transformer'
    assert keywords.items() >= shown.items()


def test_what_is_no_vit_is_not_recognised():
    shapes = make_vision.timm_vit(**BASE, patch=16)
    distilled = shapes | {'pos_embed': (1, 198, 768), 'dist_token': (1, 1, 768)}
    assert not recognised(distilled)
    assert not recognised({k: v for k, v in shapes.items() if 'patch_embed' not in k})
    assert not recognised(make_vision.torchvision_efficientnet(width=1.0, depth=1.0))
    assert not recognised(make_vision.timm_efficientnet(width=1.0, depth=1.0))


@pytest.mark.parametrize('name', NETWORKS)
def test_a_missing_and_a_strange_array_are_named(name):
    state = make_vision.arrays(NETWORKS[name][1])
    gone = next(k for k in state if 'LayerNorm_2' in k or 'norm2' in k or 'norm_after' in k)
    del state[gone]
    state['pre_logits/kernel'] = np.zeros((4, 4))
    with pytest.raises(UserError, match='missing') as error:
        pretrained.convert(state)
    assert gone in str(error.value)
    assert 'pre_logits/kernel' in str(error.value)


def test_preprocessing_is_that_of_the_source():
    found = {(p.source, size): p for size in (224, 384) for p in vit.layouts(size)}
    timm = found['timm', 224].preprocessing(1000)
    assert (timm.size, timm.resize, timm.interpolation) == (224, 248, 'bicubic')
    assert timm.mean == timm.std == (0.5, 0.5, 0.5)
    timm = found['timm', 384].preprocessing(1000)
    assert (timm.size, timm.resize) == (384, None)
    other = found['transformers', 224].preprocessing(10)
    assert (other.size, other.resize, other.interpolation) == (224, None, 'bilinear')
    assert found['timm deit', 224].preprocessing(1000).std == (0.229, 0.224, 0.225)


TINY = dict(size=8, patch=4, width=8, depth=2, heads=2, mlp=12)
IMAGES = jax.random.normal(jax.random.key(0), (3, 8, 8, 2))


def test_maps_are_grids_of_patch_tokens():
    """Without blocks' effects, map [i, j] is patch [i, j]'s embedding plus its position."""
    net = ViT(**TINY)
    params = net.init(jax.random.key(1), IMAGES, train=False)['params']
    for block in ('block0', 'block1'):
        for name in ('out', 'fc2'):
            params[block][name] = jax.tree.map(jnp.zeros_like, params[block][name])
    _, maps = net.apply({'params': params}, IMAGES, train=False)
    kernel, bias = params['patches']['kernel'], params['patches']['bias']
    for i in range(2):
        for j in range(2):
            patch = IMAGES[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            want = jnp.einsum('bhwc,hwcd->bd', patch, kernel) + bias
            want = want + params['positions'][0, 1 + 2 * i + j]
            for grid in maps:
                np.testing.assert_allclose(grid[:, i, j], want, atol=1e-5)


def test_fused_and_separate_projections_are_one():
    fused, separate = ViT(**TINY), ViT(**TINY, fused=False)
    params = fused.init(jax.random.key(1), IMAGES, train=False)['params']
    parts = dict(params)
    for block in ('block0', 'block1'):
        parts[block] = dict(params[block])
        qkv = parts[block].pop('qkv')
        for i, name in enumerate(('query', 'key', 'value')):
            parts[block][name] = {k: v[..., 8 * i : 8 * i + 8] for k, v in qkv.items()}
    want, _ = fused.apply({'params': params}, IMAGES, train=False)
    got, _ = separate.apply({'params': parts}, IMAGES, train=False)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_gelu_is_the_exact_one_or_its_approximation():
    """A block whose second half maps any input to x + GELU(b)."""
    b, x = np.linspace(-3.0, 3.0, 8), jnp.ones((1, 5, 8))
    for approximate, gate in (
        (False, [math.erf(v / math.sqrt(2)) for v in b]),
        (True, np.tanh(math.sqrt(2 / math.pi) * (b + 0.044715 * b**3))),
    ):
        settings = dict(heads=2, mlp=8, epsilon=1e-6, fused=True, dtype=jnp.float32)
        block = vit.Block(approximate_gelu=approximate, **settings)
        params = block.init(jax.random.key(0), x)['params']
        params = jax.tree.map(jnp.zeros_like, params)
        params['norm2']['bias'] = jnp.asarray(b)
        params['fc1']['kernel'] = params['fc2']['kernel'] = jnp.eye(8)
        y = block.apply({'params': params}, x)
        np.testing.assert_allclose(y[0, 0], 1 + 0.5 * b * (1 + np.asarray(gate)), atol=1e-5)


def test_a_vit_trains_without_batch_statistics():
    """One step of the plain loss: gradients everywhere, and nothing beside the parameters."""
    model = Classifier(ViT(**TINY), Linear(4))
    variables = model.init(jax.random.key(1), IMAGES, train=False)
    extra = plain.init_extra(variables)
    assert extra == {}
    batch = {'image': IMAGES, 'label': jnp.array([0, 1, 3]), 'index': jnp.arange(3)}

    def loss(params):
        prepare = lambda images, keys: images
        key = jax.random.key(2)
        return plain.loss_fn(params, extra, batch, key, model=model, step=0, prepare=prepare)

    (_, (after, _)), grads = jax.value_and_grad(loss, has_aux=True)(variables['params'])
    assert after == {}
    # A key's bias adds the same to all of a query's logits: softmax does not see it.
    for block in ('block0', 'block1'):
        bias = grads['backbone'][block]['qkv']['bias']
        np.testing.assert_allclose(bias[8:16], 0, atol=1e-6)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_what_a_vit_refuses():
    net = ViT(**TINY)
    variables = net.init(jax.random.key(1), IMAGES, train=False)
    with pytest.raises(ValueError, match='class token'):
        net.apply(variables, jnp.zeros((3, 2, 2, 8)), train=False, after=0)
    with pytest.raises(UserError, match='8 x 8 pixels'):
        net.apply(variables, jnp.zeros((3, 8, 12, 2)), train=False)
    with pytest.raises(UserError, match='patch must divide size'):
        ViT(size=224, patch=15)
