"""The command: what it says, what it writes, what it refuses."""

import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from pipelines import folder as pipeline
from pipelines import single
from reference.make_classifiers import NETWORKS
from reference.make_stable_diffusion import config
from reference.make_vision import arrays

from jaxood import convert
from jaxood.models import pretrained
from jaxood.models.stable_diffusion import folder, fresh

AKAMASTER = 'akamaster/pytorch_resnet_cifar10'


@pytest.fixture(autouse=True)
def _forgotten():
    """Flags outlive a call of `main`, which a process makes only once."""
    yield
    for name in convert.FLAGS:
        convert.FLAGS[name].unparse()


@pytest.fixture
def source(tmp_path):
    np.savez(tmp_path / 'net.npz', **arrays(NETWORKS[AKAMASTER][1]))
    return tmp_path / 'net.npz'


def run(*argv):
    return convert.main(['convert', 'classifier', *argv])


def test_it_says_what_it_found_and_writes_what_loads(source, tmp_path, capsys):
    assert run(f'--source={source}', f'--out={tmp_path / "out"}') == 0
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert said['network'].startswith('resnet (blocks=(2, 1, 2), width=4, ')
    # counted by hand: stem, 3 blocks at one width, 1 to the next and 1 there, head
    conv = 9 * (3 * 4 + 4 * 4 * 4 + 4 * 8 + 8 * 8 + 8 * 16 + 3 * 16 * 16)
    norm = 2 * (5 * 4 + 2 * 8 + 4 * 16)
    assert said['parameters'] == f'{conv + norm + 16 * 5 + 5:,}'
    assert said['classes'] == '5'
    assert said['mean'] == '(0.485, 0.456, 0.406)'
    assert said['written'] == f'to     {tmp_path / "out"}'
    found, want = pretrained.load(tmp_path / 'out'), pretrained.load(source)
    assert (found.digest, found.preprocessing) == (want.digest, want.preprocessing)


def test_constants_of_the_images_can_be_given(source, tmp_path):
    assert run(f'--source={source}', f'--out={tmp_path}', '--mean=0.1,0.2,0.3') == 0
    prepared = pretrained.load(tmp_path).preprocessing
    assert prepared.mean == (0.1, 0.2, 0.3)
    assert prepared.std == (0.229, 0.224, 0.225)


def test_names_that_several_sources_use(tmp_path, capsys):
    path = tmp_path / 'net.npz'
    np.savez(path, **arrays(NETWORKS['torchvision'][1]))
    assert run(f'--source={path}', f'--out={tmp_path}') == 0
    assert 'and timm: if it is theirs, --origin=timm' in capsys.readouterr().out
    assert run(f'--source={path}', f'--out={tmp_path}', '--origin=timm') == 0
    assert pretrained.load(tmp_path).preprocessing.interpolation == 'bicubic'


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['clasifier'], "Did you mean 'classifier'? Known: classifier, stable-diffusion, clip."),
        ([], 'Known: classifier, stable-diffusion, clip.'),
        (['classifier', 'net.npz'], "'net.npz' is not a flag"),
        (['classifier', '--source=a.npz'], '--source and --out are needed'),
        (['classifier', '--sauce=a.npz'], "Did you mean 'source'"),
        (['classifier', '--source=a', '--out=b', '--std=a,b,c'], '--std=a,b,c: could not convert'),
        (['classifier', '--source=a', '--out=b', '--mean=1,2'], 'three numbers between 0 and 1'),
        (['classifier', '--source=a', '--out=b', '--mean=125.3,123,113.9'], 'Divide those'),
        (['classifier', '--source=a', '--out=b', '--std=0.2,0.2,0'], 'above 0'),
        (['classifier', '--source=nowhere.npz', '--out=b'], 'there is no such file'),
        (['classifier', '--source=a', '--out=b', '--variant=c'], '--variant says nothing to class'),
        (['clip', '--source=a', '--out=b', '--mean=1'], 'takes verify, variant, to-diffusers'),
        (['clip', '--source=nowhere', '--out=b'], 'no such folder, and it is no hub id'),
    ],
)
def test_bad_arguments(argv, message, capsys):
    assert convert.main(['convert', *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_leaves_nothing(source, tmp_path, capsys):
    given = dict(np.load(source))
    del given['bn1.bias']
    np.savez(source, **given)
    assert run(f'--source={source}', f'--out={tmp_path / "out"}') == 2
    error = capsys.readouterr().err
    assert error.startswith(f'jaxood: {source}: ')
    assert 'bn1.bias  missing' in error
    assert not (tmp_path / 'out').exists()


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        convert.main(['convert', '--help'])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name in convert.FLAGS:
        assert f'--{name}' in shown or f'--[no]{name}' in shown
    for repository in ('stable-diffusion-v1-5/stable-diffusion-v1-5', 'openai/clip-vit-large'):
        assert repository in shown


def test_verify_without_pytorch_says_what_to_install(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch', None)
    assert run(f'--source={source}', f'--out={tmp_path / "out"}', '--verify') == 2
    assert 'jaxood[parity]' in capsys.readouterr().err


def convert_folder(kind, source, out, *more):
    for name in convert.FLAGS:
        convert.FLAGS[name].unparse()
    return convert.main(['convert', kind, f'--source={source}', f'--out={out}', *more])


# Runs in a process in which PyTorch, TensorFlow and transformers cannot be imported.
CHAIN = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition('.')[0] in ('torch', 'tensorflow', 'transformers'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from jaxood import convert
source, out = sys.argv[1:]
flags = [f'--source={source}', f'--out={out}', '--verify']
assert convert.main(['convert', 'stable-diffusion', *flags]) == 0
import numpy as np
from jaxood import parallel
from jaxood.models.stable_diffusion import folder, pipeline
sd = folder.load(out)
size = dict(height=8, width=8, steps=2)
images = pipeline.render(sd, parallel.setup(), ['a photo of a three', ''], [0, 1], **size)
images = np.concatenate(list(images))
assert (images.shape, images.dtype) == ((2, 8, 8, 3), np.uint8)
assert images.std() > 10
"""


def test_from_download_to_image_without_pytorch_tensorflow_and_transformers(tmp_path):
    found = subprocess.run(
        [sys.executable, '-c', CHAIN, pipeline('sd1'), tmp_path / 'out'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    said = dict(line.split(None, 1) for line in found.stdout.splitlines() if line[:1] != ' ')
    assert said['unet'] == '138,836 parameters, float32'
    assert said['tokens'] == '526'
    assert said['verified'].startswith('names, shapes, and that outputs are finite')


def test_a_folder_that_does_not_fit_leaves_nothing(tmp_path, capsys):
    source = shutil.copytree(pipeline('sd1'), tmp_path / 'source')
    shutil.rmtree(pathlib.Path(source) / 'tokenizer')
    assert convert_folder('stable-diffusion', source, tmp_path / 'out') == 2
    assert 'tokenizer: there is neither' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_back_to_diffusers_is_of_what_was_converted(tmp_path, capsys):
    out = tmp_path / 'out'
    assert convert_folder('clip', pipeline('clip'), out, '--to-diffusers') == 2
    assert 'these are the names of diffusers already' in capsys.readouterr().err
    assert convert_folder('clip', pipeline('clip'), out) == 0
    assert convert_folder('clip', out, out, '--to-diffusers') == 2
    assert 'is the source itself' in capsys.readouterr().err
    assert convert_folder('clip', out, tmp_path / 'back', '--to-diffusers') == 0
    assert (tmp_path / 'back' / 'model.safetensors').exists()


def test_a_single_file_becomes_the_folder_it_was_made_of(tmp_path, capsys):
    file, frame = single(tmp_path / 'sd.safetensors'), f'--config-from={pipeline("sd1")}'
    assert convert_folder('stable-diffusion', file, tmp_path / 'out', frame) == 0
    assert convert_folder('stable-diffusion', pipeline('sd1'), tmp_path / 'wanted') == 0
    files = [p for p in (tmp_path / 'wanted').rglob('*') if p.is_file()]
    assert len(files) == 12
    for wanted in files:
        found = tmp_path / 'out' / wanted.relative_to(tmp_path / 'wanted')
        assert found.read_bytes() == wanted.read_bytes()
    # and with diffusers' names, from the configs and the tokenizer alone
    for weights in shutil.copytree(pipeline('sd1'), tmp_path / 'frame').rglob('*.safetensors'):
        weights.unlink()
    more = (f'--config-from={tmp_path / "frame"}', '--to-diffusers')
    assert convert_folder('stable-diffusion', file, tmp_path / 'theirs', *more) == 0
    assert convert_folder('stable-diffusion', tmp_path / 'theirs', tmp_path / 'again') == 0
    for name in ('text_encoder', 'unet', 'vae'):
        found, wanted = (tmp_path / f / name / 'weights.safetensors' for f in ('again', 'wanted'))
        assert found.read_bytes() == wanted.read_bytes()
    assert 'unet           138,836 parameters, float32' in capsys.readouterr().out


def test_a_single_file_and_the_two_files_of_the_tokenizer(tmp_path, monkeypatch):
    tiny = {name: config('sd1', name) for name in ('text_encoder', 'unet', 'vae')}
    monkeypatch.setattr(fresh, 'STABLE_DIFFUSION_1_5', tiny)
    (tmp_path / 'words').mkdir()
    for name in ('vocab.json', 'merges.txt'):
        shutil.copy(pipeline('sd1') / 'tokenizer' / name, tmp_path / 'words')
    file, more = single(tmp_path / 'sd.safetensors'), f'--config-from={tmp_path / "words"}'
    assert convert_folder('stable-diffusion', file, tmp_path / 'out', more) == 0
    found, wanted = folder.load(tmp_path / 'out'), folder.load(pipeline('sd1'))
    assert (found.networks, found.size) == (wanted.networks, wanted.size)
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    texts = ['a photo of a cat', '']
    np.testing.assert_array_equal(found.tokenizer(texts), wanted.tokenizer(texts))


def test_what_a_single_file_needs(tmp_path, capsys):
    def said(source, *flags):
        assert convert_folder('stable-diffusion', source, tmp_path / 'out', *flags) == 2
        assert not (tmp_path / 'out').exists()
        return capsys.readouterr().err

    file = single(tmp_path / 'sd.safetensors')
    (tmp_path / 'empty').mkdir()
    for flags in ((), (f'--config-from={tmp_path / "empty"}',)):
        error = said(file, *flags)
        assert 'vocab.json and merges.txt' in error
        assert 'https://huggingface.co/openai/clip-vit-large-patch14' in error
    # with the tokenizer alone the sizes are those of 1.5
    error = said(file, f'--config-from={pipeline("sd1") / "tokenizer"}')
    assert 'are not those of Stable Diffusion 1.5' in error
    assert re.search(
        r'text_model.embeddings.token_embedding.weight +\(526, 16\) +\(49408, 768\)', error
    )
    (tmp_path / 'words').mkdir()
    (tmp_path / 'words' / 'merges.txt').write_text('')
    (tmp_path / 'words' / 'vocab.json').write_text('{')
    assert f'{tmp_path / "words"}: the tokenizer is damaged' in said(
        file, f'--config-from={tmp_path / "words"}'
    )
    assert 'for a single file' in said(pipeline('sd1'), f'--config-from={tmp_path}')
    assert 'for a folder' in said(file, f'--config-from={tmp_path}', '--variant=fp16')
    other = single(
        tmp_path / 'xl.safetensors', change=lambda a: a.update({'conditioner.x': a['betas']})
    )
    assert 'this is Stable Diffusion XL' in said(other)
    file.write_bytes(file.read_bytes()[:-1000])
    assert 'truncated' in said(file, f'--config-from={pipeline("sd1")}')


def test_a_hub_id_is_downloaded_and_only_what_is_needed(tmp_path, monkeypatch, capsys):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def snapshot(repository, *, allow_patterns):
        asked[repository] = allow_patterns
        if repository == 'no/one':
            raise OSError('Name or service not known\nand more')
        return pipeline('clip' if 'clip' in repository else 'sd1')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot)
    assert convert_folder('stable-diffusion', 'some/sd', tmp_path / 'a') == 0
    assert convert_folder('clip', 'some/clip', tmp_path / 'b') == 0
    assert convert_folder('clip', 'no/one', tmp_path / 'c') == 2
    assert '(OSError: Name or service not known). `--help` says' in capsys.readouterr().err
    needed = [str(p.relative_to(pipeline('sd1'))) for p in pipeline('sd1').rglob('*.*')]
    shard = 'unet/diffusion_pytorch_model-00001-of-00002.safetensors'
    needed += [shard, 'unet/diffusion_pytorch_model.safetensors.index.json']
    others = ['v1-5-pruned.ckpt', 'v1-5-pruned.safetensors', 'unet/diffusion_pytorch_model.bin']
    others += ['unet/diffusion_pytorch_model.fp16.safetensors', 'safety_checker/model.safetensors']
    others += ['unet/diffusion_flax_model.msgpack', 'text_encoder/model.fp16.safetensors']
    found = filter_repo_objects(needed + others, allow_patterns=asked['some/sd'])
    assert sorted(found) == sorted(needed)


if importlib.util.find_spec('torch'):  # the `parity` extra

    @pytest.mark.parametrize('name', NETWORKS)
    def test_verify_agrees_with_the_original(name, tmp_path, capsys):
        np.savez(tmp_path / 'net.npz', **arrays(NETWORKS[name][1]))
        assert run(f'--source={tmp_path / "net.npz"}', f'--out={tmp_path}', '--verify') == 0
        assert 'verified       logits differ by at most ' in capsys.readouterr().out
        assert json.loads((tmp_path / 'model.json').read_text())['num_classes'] == 5

    def test_verify_refuses_a_network_that_computes_something_else(
        source, tmp_path, monkeypatch, capsys
    ):
        from jaxood.models import torch_originals

        original = torch_originals.ORIGINALS['resnet']
        wrong = lambda state, keywords, images: original(state, keywords, images.flip(-1)) * 1.01
        monkeypatch.setitem(torch_originals.ORIGINALS, 'resnet', wrong)
        assert run(f'--source={source}', f'--out={tmp_path / "out"}', '--verify') == 2
        assert 'logits differ from those of the original' in capsys.readouterr().err
        assert not (tmp_path / 'out').exists()

    @pytest.mark.slow
    @pytest.mark.parametrize('change', [False, True])
    def test_verify_compares_a_folder_with_diffusers(change, tmp_path, monkeypatch, capsys):
        from jaxood.models.stable_diffusion import blocks

        if change:  # a network that is nearly right
            monkeypatch.setattr(blocks.nn, 'silu', lambda x: 1.01 * blocks.nn.swish(x))
        code = convert_folder('stable-diffusion', pipeline('sd1'), tmp_path / 'out', '--verify')
        said = capsys.readouterr()
        assert code == (2 if change else 0)
        assert 'a sampling of 20 steps differs from the original by' in said.out
        assert ('unet' in said.err and 'computes something else' in said.err) == change
        assert (tmp_path / 'out').exists() != change

    @pytest.mark.slow
    @pytest.mark.parametrize('ending', ['safetensors', 'ckpt'])
    def test_verify_compares_a_single_file_with_diffusers(ending, tmp_path, capsys):
        import torch
        from safetensors.torch import load_file

        file = single(tmp_path / 'sd.safetensors')
        if ending == 'ckpt':
            torch.save({'state_dict': load_file(file)}, file := tmp_path / 'sd.ckpt')
        more = (f'--config-from={pipeline("sd1")}', '--verify')
        assert convert_folder('stable-diffusion', file, tmp_path / 'out', *more) == 0
        assert 'a sampling of 20 steps differs from the original by' in capsys.readouterr().out

    @pytest.mark.slow
    def test_verify_compares_a_clip_and_what_was_converted(tmp_path, capsys):
        assert convert_folder('clip', pipeline('clip'), tmp_path / 'out') == 0
        assert convert_folder('clip', tmp_path / 'out', tmp_path / 'again', '--verify') == 0
        assert 'vision differs from the original by' in capsys.readouterr().out
        weights = 'weights.safetensors'
        assert (tmp_path / 'out' / weights).read_bytes() == (
            tmp_path / 'again' / weights
        ).read_bytes()
