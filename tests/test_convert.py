"""The command: what it says, what it writes, what it refuses."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from reference.make_classifiers import NETWORKS
from reference.make_vision import arrays

from jaxood import convert
from jaxood.models import pretrained

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
        (['clasifier'], "Did you mean 'classifier'? Known: classifier."),
        ([], 'Known: classifier.'),
        (['classifier', 'net.npz'], "'net.npz' is not a flag"),
        (['classifier', '--source=a.npz'], '--source and --out are needed'),
        (['classifier', '--sauce=a.npz'], "Did you mean 'source'"),
        (['classifier', '--source=a', '--out=b', '--std=a,b,c'], '--std=a,b,c: could not convert'),
        (['classifier', '--source=a', '--out=b', '--mean=1,2'], 'three numbers between 0 and 1'),
        (['classifier', '--source=a', '--out=b', '--mean=125.3,123,113.9'], 'Divide those'),
        (['classifier', '--source=a', '--out=b', '--std=0.2,0.2,0'], 'above 0'),
        (['classifier', '--source=nowhere.npz', '--out=b'], 'there is no such file'),
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
    for name in ('source', 'out', 'verify', 'origin', 'mean', 'std'):
        assert f'--{name}' in shown or f'--[no]{name}' in shown


def test_verify_without_pytorch_says_what_to_install(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch', None)
    assert run(f'--source={source}', f'--out={tmp_path / "out"}', '--verify') == 2
    assert 'jaxood[parity]' in capsys.readouterr().err


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
