"""Folders of pipelines: there and back without a changed bit, and what is wrong with others."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from pipelines import PIPELINES
from pipelines import folder as made
from reference import make_stable_diffusion as reference

from jaxood.errors import UserError
from jaxood.models import components
from jaxood.models.stable_diffusion import folder

UNET = 'unet/diffusion_pytorch_model.safetensors'


@pytest.fixture
def place(tmp_path):
    """A pipeline folder to be damaged."""
    return pathlib.Path(shutil.copytree(made('sd1'), tmp_path / 'sd1'))


def converted(source, out, kind='stable-diffusion', **keywords):
    found = folder.parts(pathlib.Path(source), kind, keywords.pop('variant', None))
    return out, folder.save(pathlib.Path(out), pathlib.Path(source), found, **keywords)


def arrays(file):
    return safetensors.numpy.load_file(file)


def rooted(found):
    """transformers 5 leaves out a prefix of the text encoder's names; we write it, as 4 did."""
    return {name.removeprefix('text_model.'): array for name, array in found.items()}


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_there_and_back_no_bit_changes(dtype, tmp_path):
    source = reference.folder(tmp_path / 'theirs', 'sd1', jnp.dtype(dtype))
    there, _ = converted(source, tmp_path / 'ours')
    converted(there, tmp_path / 'back', to_diffusers=True)
    again, _ = converted(tmp_path / 'back', tmp_path / 'again')
    names = {p.relative_to(source) for p in source.rglob('*') if p.is_file()}
    assert names == {p.relative_to(tmp_path / 'back') for p in tmp_path.rglob('back/**/*.*')}
    for name in names:
        a, b = source / name, tmp_path / 'back' / name
        if name.suffix == '.safetensors':
            a, b = rooted(arrays(a)), rooted(arrays(b))
            assert a.keys() == b.keys()
            for key in a:
                assert a[key].dtype == b[key].dtype == jnp.dtype(dtype)
                np.testing.assert_array_equal(a[key], b[key])
        else:
            same = json.loads if name.suffix == '.json' else str
            assert same(a.read_text()) == same(b.read_text())
    for name in ('text_encoder', 'unet', 'vae'):
        files = (p / name / folder.WEIGHTS for p in (there, again))
        first, second = (file.read_bytes() for file in files)
        assert first == second


def test_what_is_converted_loads_as_what_it_was_made_of(tmp_path):
    out, facts = converted(made('sd1'), tmp_path / 'ours')
    a, b = folder.load(made('sd1')), folder.load(out)
    assert a.networks == b.networks
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert facts['unet']['parameters'] == sum(x.size for x in jax.tree.leaves(a.params['unet']))
    assert json.loads((out / folder.MARK).read_text()) == facts
    assert a.size == 16  # 8 latents, halved once
    half = folder.load(out, dtype=jnp.bfloat16, params_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype('bfloat16')}
    assert half.networks.unet.dtype == jnp.bfloat16


def test_a_clip_there_and_back(tmp_path):
    out, _ = converted(made('clip'), tmp_path / 'ours', 'clip')
    converted(out, tmp_path / 'back', 'clip', to_diffusers=True)
    a, b = (arrays(p / 'model.safetensors') for p in (made('clip'), tmp_path / 'back'))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert folder.load_clip(out).text.projection == 12


def test_shards_and_variants_and_old_names(place, tmp_path):
    """One network in two shards, one as a variant, one with the attention's names before 0.12."""
    wanted = folder.load(place).params
    unet = arrays(place / UNET)
    shards = {f'diffusion_pytorch_model-0000{i}-of-00002.safetensors': {} for i in (1, 2)}
    index = {name: sorted(shards)[i % 2] for i, name in enumerate(unet)}
    for name, file in index.items():
        shards[file][name] = unet[name]
    for file, content in shards.items():
        safetensors.numpy.save_file(content, place / 'unet' / file)
    (place / UNET).unlink()
    (place / f'{UNET}.index.json').write_text(json.dumps({'weight_map': index}))

    old = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
    vae = arrays(place / 'vae' / 'diffusion_pytorch_model.safetensors')
    for new, name in old.items():
        vae = {k.replace(f'attentions.0.{new}', f'attentions.0.{name}'): v for k, v in vae.items()}
    key = 'encoder.mid_block.attentions.0.query.weight'
    vae[key] = vae[key][..., None, None]  # older still: a 1x1 convolution
    safetensors.numpy.save_file(vae, place / 'vae' / 'diffusion_pytorch_model.safetensors')

    text = arrays(place / 'text_encoder' / 'model.safetensors')  # transformers 5 drops the prefix
    text = {f'text_model.{name.removeprefix("text_model.")}': v for name, v in text.items()}
    text['text_model.embeddings.position_ids'] = np.arange(77)[None]
    safetensors.numpy.save_file(text, place / 'text_encoder' / 'model.safetensors')
    jax.tree.map(np.testing.assert_array_equal, folder.load(place).params, wanted)

    for file in place.rglob('*.safetensors'):
        file.rename(file.with_name(file.name.replace('model', 'model.fp16')))
    (place / f'{UNET}.index.json').rename(place / f'{UNET}.index.fp16.json')
    renamed = {n: f.replace('model', 'model.fp16') for n, f in index.items()}
    (place / f'{UNET}.index.fp16.json').write_text(json.dumps({'weight_map': renamed}))
    jax.tree.map(np.testing.assert_array_equal, folder.load(place, variant='fp16').params, wanted)
    with pytest.raises(UserError, match=r'no weights .*Give --variant=fp16'):
        folder.load(place)


def change(file, **changes):
    """A JSON file with other entries."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content))


def weights(place, changed):
    """The U-Net's file with its arrays changed."""
    content = arrays(place / UNET)
    changed(content)
    safetensors.numpy.save_file(content, place / UNET)


DAMAGE = {
    'no such folder': (shutil.rmtree, 'there is no such folder'),
    'no pipeline': (lambda p: (p / 'model_index.json').unlink(), 'has a model_index.json; this'),
    'SDXL': (
        lambda p: change(p / 'model_index.json', _class_name='StableDiffusionXLPipeline'),
        'this is a StableDiffusionXLPipeline. Supported are Stable Diffusion 1.x and 2.x',
    ),
    'SDXL by its U-Net': (
        lambda p: change(p / 'unet/config.json', addition_embed_type='text_time'),
        'unet/config.json: this is the U-Net of SDXL',
    ),
    'component': (lambda p: shutil.rmtree(p / 'vae'), 'the component vae is missing'),
    'scheduler': (lambda p: shutil.rmtree(p / 'scheduler'), 'scheduler_config.json is missing'),
    'config': (lambda p: (p / 'vae/config.json').write_text('{'), 'it is no JSON, or damaged'),
    'weights': (lambda p: (p / UNET).unlink(), 'no weights at all. Download it'),
    'pointer': (
        lambda p: (p / UNET).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0'),
        'it is a Git LFS pointer, not the weights',
    ),
    'truncated': (
        lambda p: (p / UNET).write_bytes((p / UNET).read_bytes()[:-1000]),
        'it is not what its ending says, or truncated',
    ),
    'beheaded': (
        lambda p: (p / UNET).write_bytes((p / UNET).read_bytes()[:1000]),
        'it is not what its ending says, or truncated',
    ),
    'missing': (
        lambda p: weights(p, lambda a: a.pop('conv_in.bias')),
        r'conv_in.bias  missing +\(16,\)',
    ),
    'unused': (
        lambda p: weights(p, lambda a: a.update(extra=np.zeros(3, np.float32))),
        r'extra  \(3,\) +unused',
    ),
    'shape': (
        lambda p: weights(p, lambda a: a.update({'conv_in.bias': np.zeros(3, np.float32)})),
        r'conv_in.bias  \(3,\) +\(16,\)',
    ),
    'type': (
        lambda p: weights(p, lambda a: a.update({'conv_in.bias': np.zeros(16, np.int8)})),
        r'conv_in.bias  I8 +float64 or float32',
    ),
    'not finite': (
        lambda p: weights(p, lambda a: a['conv_in.bias'].fill(np.nan)),
        'conv_in.bias holds numbers that are not finite',
    ),
    'betas': (
        lambda p: change(p / 'scheduler/scheduler_config.json', rescale_betas_zero_snr=True),
        'rescale_betas_zero_snr=True; only False is supported',
    ),
    'schedule': (
        lambda p: change(p / 'scheduler/scheduler_config.json', beta_schedule='sigmoid'),
        "beta_schedule='sigmoid'. Supported: scaled_linear, linear, squaredcos_cap_v2",
    ),
    'tokenizer': (lambda p: shutil.rmtree(p / 'tokenizer'), 'neither vocab.json with merges.txt'),
}


@pytest.mark.parametrize('what', DAMAGE)
def test_folders_that_do_not_load(what, place):
    damage, message = DAMAGE[what]
    damage(place)
    with pytest.raises(UserError, match=message) as raised:
        folder.load(place)
    assert str(place) in str(raised.value)


def test_other_things_than_pipelines(tmp_path):
    (tmp_path / 'sd.ckpt').write_bytes(b'\x80')
    with pytest.raises(UserError, match='this is one file.*jaxood.convert stable-diff'):
        folder.load(tmp_path / 'sd.ckpt')
    with pytest.raises(UserError, match='model_index.json.* and is a clip'):
        folder.load(made('clip'))
    with pytest.raises(UserError, match='this is a pipeline. Convert it as stable-diffusion'):
        folder.load_clip(made('sd1'))
    with pytest.raises(UserError, match='no CLIP but UNet2DConditionModel'):
        folder.load_clip(made('sd1') / 'unet')


def test_a_conversion_that_was_interrupted_does_not_load(tmp_path, monkeypatch):
    out, _ = converted(made('sd1'), tmp_path / 'ours')
    write = folder._write_safetensors

    def stop(path, *rest):
        if path.parent.name == 'vae':
            raise KeyboardInterrupt
        return write(path, *rest)

    monkeypatch.setattr(folder, '_write_safetensors', stop)
    with pytest.raises(KeyboardInterrupt):
        converted(made('deep'), out)
    with pytest.raises(UserError, match='the conversion was interrupted'):
        folder.load(out)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(UserError, match='0.0 GB are needed and 0.0 GB are free. Nothing was'):
        converted(made('sd1'), tmp_path / 'ours')
    assert not (tmp_path / 'ours').exists()


def test_the_schedule_is_the_files():
    """Spec values: 0-based 0.99915, 0.27767, 0.0046601 at 0, 499, 999."""
    found = folder.schedule(reference.config('sd1', 'scheduler'), 'it')
    np.testing.assert_allclose(
        found.alpha_bar[[1, 500, 1000]], [0.99915, 0.27767, 0.0046601], rtol=2e-5
    )
    assert (found.prediction, found.end, found.num_steps) == ('eps', 1, 1000)
    config = reference.config('sd2', 'scheduler') | {'set_alpha_to_one': True}
    assert folder.schedule(config, 'it')[3:] == ('v', 0)


@pytest.mark.parametrize('pipeline', PIPELINES)
def test_names_are_all_those_of_diffusers(pipeline):
    """And each shape there and back is the same."""
    for name in folder.KINDS['stable-diffusion']:
        component = components.COMPONENTS[name]
        targets = component.targets(component.build(reference.config(pipeline, name)))
        found = {n: components.shape_of_theirs(target) for n, target in targets.items()}
        wanted = reference.shapes(pipeline)[name]
        if name == 'text_encoder':
            wanted = {f'text_model.{n.removeprefix("text_model.")}': s for n, s in wanted.items()}
        assert {n: list(shape) for n, shape in found.items()} == wanted
