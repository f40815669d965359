"""Single files of Stable Diffusion 1.x in the original names."""

import jax
import ml_dtypes
import numpy as np
import pytest
from pipelines import PIPELINES, ldm_names, single
from pipelines import folder as made

from jaxood.errors import UserError
from jaxood.models.stable_diffusion import folder, fresh, ldm

# Of v1-5-pruned-emaonly and stable-diffusion-v1-5, each by its shape and place in both networks.
WELL_KNOWN = {
    'unet': {
        'time_embedding.linear_1.weight': 'time_embed.0.weight',
        'conv_in.weight': 'input_blocks.0.0.weight',
        'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight': (
            'input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight'
        ),
        'down_blocks.0.downsamplers.0.conv.weight': 'input_blocks.3.0.op.weight',
        'down_blocks.1.resnets.0.conv_shortcut.weight': 'input_blocks.4.0.skip_connection.weight',
        'down_blocks.3.resnets.1.time_emb_proj.bias': 'input_blocks.11.0.emb_layers.1.bias',
        'mid_block.resnets.0.norm1.weight': 'middle_block.0.in_layers.0.weight',
        'mid_block.attentions.0.proj_in.weight': 'middle_block.1.proj_in.weight',
        'mid_block.resnets.1.conv2.weight': 'middle_block.2.out_layers.3.weight',
        'up_blocks.0.upsamplers.0.conv.weight': 'output_blocks.2.1.conv.weight',
        'up_blocks.1.upsamplers.0.conv.weight': 'output_blocks.5.2.conv.weight',
        'up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.weight': (
            'output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight'
        ),
        'conv_norm_out.bias': 'out.0.bias',
        'conv_out.bias': 'out.2.bias',
    },
    'vae': {
        'encoder.conv_norm_out.weight': 'encoder.norm_out.weight',
        'encoder.down_blocks.1.resnets.0.conv_shortcut.weight': (
            'encoder.down.1.block.0.nin_shortcut.weight'
        ),
        'encoder.down_blocks.2.downsamplers.0.conv.bias': 'encoder.down.2.downsample.conv.bias',
        'encoder.mid_block.attentions.0.to_q.weight': 'encoder.mid.attn_1.q.weight',
        'encoder.mid_block.attentions.0.to_out.0.weight': 'encoder.mid.attn_1.proj_out.weight',
        'encoder.mid_block.attentions.0.group_norm.bias': 'encoder.mid.attn_1.norm.bias',
        'decoder.mid_block.resnets.1.conv1.weight': 'decoder.mid.block_2.conv1.weight',
        'decoder.up_blocks.0.resnets.0.conv1.weight': 'decoder.up.3.block.0.conv1.weight',
        'decoder.up_blocks.2.upsamplers.0.conv.weight': 'decoder.up.1.upsample.conv.weight',
        'post_quant_conv.weight': 'post_quant_conv.weight',
    },
    'text_encoder': {
        'text_model.encoder.layers.11.mlp.fc1.bias': 'text_model.encoder.layers.11.mlp.fc1.bias',
    },
}
PREFIXES = {'unet': ldm.UNET, 'vae': ldm.VAE, 'text_encoder': ldm.TEXT}


def read(file, pipeline='sd1'):
    return folder.single(folder.open_single(file), made(pipeline))


def test_the_names_of_1_5_are_the_well_known_ones():
    found = {}
    for component, config in fresh.STABLE_DIFFUSION_1_5.items():
        table, shapes = ldm_names(component, config)
        for name, new in WELL_KNOWN[component].items():
            assert table[name] == PREFIXES[component] + new
        found |= {table[n]: shape for n, shape in shapes.items()}
    assert len(found) == 686 + 248 + 196  # none twice
    own = lambda name: found[f'model.diffusion_model.{name}.weight']
    assert own('output_blocks.11.0.skip_connection') == (320, 640, 1, 1)
    assert own('input_blocks.2.1.transformer_blocks.0.attn2.to_k') == (320, 768)
    assert sum(np.prod(shape) for shape in found.values()) == 1_066_235_307


@pytest.mark.parametrize('pipeline', PIPELINES)
def test_one_file_is_what_it_was_made_of(pipeline, tmp_path):
    parts = read(single(tmp_path / 'sd.safetensors', pipeline), pipeline)
    wanted = folder.parts(made(pipeline), 'stable-diffusion')
    for ours, theirs in zip(parts, wanted, strict=True):
        assert (ours.name, ours.modules) == (theirs.name, theirs.modules)
        a, b = dict(ours.arrays), dict(theirs.arrays)
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_types_stay(tmp_path):
    def half(content):
        content.update({n: a.astype(ml_dtypes.bfloat16) for n, a in content.items()})

    parts = read(single(tmp_path / 'sd.safetensors', change=half))
    assert {dtype for part in parts for dtype in part.dtypes.values()} == {'bfloat16'}
    assert {str(array.dtype) for part in parts for _, array in part.arrays} == {'bfloat16'}


def swap(old, new):
    """Names that begin with `old` begin with `new`."""

    def change(content):
        for name in [n for n in content if n.startswith(old)]:
            content[new + name.removeprefix(old)] = content.pop(name)

    return change


def several(content):
    """One name of each network is wrong, each in another way; another is nobody's."""
    content.pop('model.diffusion_model.out.2.bias')
    content['first_stage_model.quant_conv.bias'] = np.zeros(3, np.float32)
    content['cond_stage_model.transformer.extra'] = np.zeros(5, np.float32)
    content['embedding_manager.x'] = np.zeros(2, np.float32)


MISFITS = {
    'SDXL': (swap('cond_stage_model.', 'conditioner.embedders.0.'), 'is Stable Diffusion XL'),
    'SD 2': (
        swap(ldm.TEXT, 'cond_stage_model.model.'),
        r'is Stable Diffusion 2.x \(it has cond_stage_model.model.\*\)(.|\n)*from_single_file',
    ),
    'nothing': (swap('', 'x.'), 'arrays is named model.diffusion_model'),
    'no VAE': (swap('first_stage_model.', 'loss.'), r'first_stage_model.*missing(.|\n)*more like'),
    'missing': (several, r'\n  model.diffusion_model.out.2.bias +missing +\(4,\)'),
    'shape': (several, r'\n  first_stage_model.quant_conv.bias +\(3,\) +\(8,\)'),
    'unused': (several, r'\n  cond_stage_model.transformer.extra +\(5,\) +unused'),
    'unknown': (several, r'\n  embedding_manager.x +\(2,\) +unused'),
}


@pytest.mark.parametrize('what', MISFITS)
def test_files_that_do_not_fit(what, tmp_path):
    change, message = MISFITS[what]
    file = single(tmp_path / 'sd.safetensors', change=change)
    with pytest.raises(UserError, match=message) as raised:
        read(file)
    assert str(raised.value).startswith(f'{file}: ')


def test_damaged_files(tmp_path):
    file = single(tmp_path / 'sd.safetensors')
    content = file.read_bytes()
    for length in (len(content) - 1000, 1000, 0):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match='not what its ending says, or truncated'):
            read(file)
    with pytest.raises(UserError, match=r"ending '\.gguf' is not known"):
        read(tmp_path / 'sd.gguf')
