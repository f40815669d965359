"""U-Net and autoencoder: what diffusers computes, its names, its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import PIPELINES, golden, network, relative
from reference import make_stable_diffusion as reference

from jaxood.errors import UserError
from jaxood.models import components
from jaxood.models.attention import attention
from jaxood.models.stable_diffusion import unet, vae

SD1 = dict(  # unet/config.json of Stable Diffusion 1.5, as its folder has it
    act_fn='silu',
    attention_head_dim=8,
    block_out_channels=[320, 640, 1280, 1280],
    center_input_sample=False,
    cross_attention_dim=768,
    down_block_types=[*['CrossAttnDownBlock2D'] * 3, 'DownBlock2D'],
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    in_channels=4,
    layers_per_block=2,
    mid_block_scale_factor=1,
    norm_eps=1e-05,
    norm_num_groups=32,
    out_channels=4,
    sample_size=64,
    up_block_types=['UpBlock2D', *['CrossAttnUpBlock2D'] * 3],
)


def count(module, *inputs):
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    return sum(leaf.size for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize('pipeline', PIPELINES)
def test_the_unet_computes_what_diffusers_computes(pipeline):
    modules, variables = network(pipeline, 'unet')
    x, t = reference.latents(pipeline), jnp.array([982, 21])  # diffusers counts from 0
    got = jax.jit(modules[''].apply)(variables, x, t, golden()[f'{pipeline}/hidden'])
    assert relative(got, golden()[f'{pipeline}/unet']) < 1e-4


@pytest.mark.parametrize('pipeline', ['sd1', 'deep'])
def test_the_autoencoder_computes_what_diffusers_computes(pipeline):
    modules, variables = network(pipeline, 'vae')
    model, size = modules[''], 6 * modules[''].factor
    apply = jax.jit(model.apply, static_argnames='method')
    mean, log_variance = apply(variables, reference.images(size), method='encode')
    assert relative(mean, golden()[f'{pipeline}/mean']) < 1e-4
    assert relative(log_variance, golden()[f'{pipeline}/log_variance']) < 1e-4
    decoded = apply(variables, reference.latents(pipeline), method='decode')
    assert relative(decoded, golden()[f'{pipeline}/decoded']) < 1e-4


def test_the_sizes_of_stable_diffusion_1_are_the_public_ones():
    model = unet.from_config(SD1)
    assert model == unet.UNet()  # the defaults
    x, t, context = jnp.zeros((1, 8, 8, 4)), jnp.ones(1, jnp.int32), jnp.zeros((1, 77, 768))
    assert count(model, x, t, context) == 859_520_964
    assert count(vae.VAE(), jnp.zeros((1, 16, 16, 3))) == 83_653_863


def test_remat_renames_no_parameter_and_wraps_every_block():
    x, t, context = jnp.ones((1, 2, 2, 4)), jnp.ones(1, jnp.int32), jnp.ones((1, 3, 4))
    tiny = dict(channels=(4,), attends=(True,), layers=1, heads=(2,), groups=2)
    made = {r: unet.UNet(**tiny, remat=r) for r in (False, True)}
    names = {r: components.shapes(m, x, t, context) for r, m in made.items()}
    assert names[False] == names[True]
    blocks = 5 + 4  # residual (one down, two in the middle, two up), and with attention
    for remat, model in made.items():
        params = jax.eval_shape(model.init, jax.random.key(0), x, t, context)
        program = str(jax.make_jaxpr(model.apply)(params, x, t, context))
        assert program.count(' remat2[') + program.count(' checkpoint[') == blocks * remat


def test_bfloat16_computes_about_the_same():
    modules, variables = network('sd1', 'unet', dtype=jnp.bfloat16)
    x, t = reference.latents('sd1'), jnp.array([982, 21])
    got = jax.jit(modules[''].apply)(variables, x, t, golden()['sd1/hidden'])
    assert got.dtype == jnp.float32
    assert 1e-4 < relative(got, golden()['sd1/unet']) < 0.1


def test_attention_falls_back_where_cudnn_refuses(monkeypatch):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8))
    want, asked, plain = attention(q, k, v), [], jax.nn.dot_product_attention

    def refusing(*args, implementation=None, **keywords):
        asked.append(implementation)
        if implementation == 'cudnn':
            raise NotImplementedError('Q must be fp16/bf16')
        return plain(*args, **keywords)

    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(jax.nn, 'dot_product_attention', refusing)
    np.testing.assert_array_equal(attention(q, k, v), want)
    assert asked == ['cudnn', None]


@pytest.mark.parametrize(
    ('build', 'change', 'message'),
    [
        (unet, dict(addition_embed_type='text_time'), 'the U-Net of SDXL'),
        (unet, dict(class_embed_type='timestep'), "class_embed_type='timestep', which we don't"),
        (unet, dict(act_fn='gelu'), "act_fn='gelu', which we don't have; 'silu' is supported"),
        (unet, dict(mid_block_type=None), 'mid_block_type=None'),
        (unet, dict(brand_new=3), 'brand_new=3'),
        (unet, dict(down_block_types=['AttnDownBlock2D', 'DownBlock2D']), 'has a AttnDownBlock2D'),
        (unet, dict(up_block_types=['CrossAttnUpBlock2D', 'UpBlock2D']), 'does not mirror'),
        (unet, dict(layers_per_block=[1, 2]), 'we have one number for all'),
        (unet, dict(attention_head_dim=[1, 2, 3]), 'contradict each other'),
        (vae, dict(use_quant_conv=False), 'use_quant_conv=False'),
        (vae, dict(down_block_types=['AttnDownEncoderBlock2D'] * 2), 'down_block_types='),
    ],
)
def test_networks_that_we_do_not_have(build, change, message):
    name = build.__name__.rpartition('.')[2]
    with pytest.raises(UserError, match=message):
        build.from_config(reference.config('sd1', name) | change)
