"""Others' checkpoints: read, recognised, converted without a gap, saved whole or not at all."""

import importlib.util
import io
import json
import os
import pickle
import runpy
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from reference import make_classifiers
from reference.make_classifiers import CLASSES, NETWORKS
from reference.make_vision import arrays

from jaxood.errors import UserError
from jaxood.models import pretrained
from jaxood.models.backbones import LAYOUTS

RESNET = 'akamaster/pytorch_resnet_cifar10'


def checkpoint(source=RESNET):
    return arrays(NETWORKS[source][1])


def flat(found):
    return flatten_dict(found.variables, sep='/')


def outputs(found, images):
    apply = jax.jit(lambda variables, x: found.build().apply(variables, x, train=False))
    return apply(found.variables, images)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    assert a._replace(variables=None) == b._replace(variables=None)


@pytest.fixture(scope='module', params=NETWORKS)
def network(request):
    """A source, and the conversion of its checkpoint."""
    return request.param, pretrained.convert(checkpoint(request.param))


def test_names_tell_the_network(network):
    source, found = network
    backbone, _, keywords = NETWORKS[source]
    assert found.source == source
    assert found.backbone == {'name': backbone, **keywords}
    assert found.num_classes == CLASSES


def test_logits_are_those_of_pytorch(network):
    """Golden logits of the restatement in PyTorch."""
    source, found = network
    got = outputs(found, make_classifiers.images())['logits']
    want = np.load(make_classifiers.LOGITS)[source]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_every_array_can_be_found_again(network):
    """Ours, written under their names in their layout, are the arrays that came."""
    source, found = network
    given = checkpoint(source)
    keywords = dict(found.backbone)
    whose = (source, keywords.pop('name'))
    layout = next(layout for layout in LAYOUTS if (layout.source, layout.backbone) == whose)
    ours = flat(found)
    back = {}
    for name, target in layout.targets(keywords, {}).items():
        array = ours.pop(target.path)
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
        back[name] = array.transpose(axes)
    assert not ours
    counters = {name for name in given if name.endswith('num_batches_tracked')}
    assert back.keys() == given.keys() - counters
    for name, array in back.items():
        np.testing.assert_array_equal(array, given[name])


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda layout: layout.source)
def test_preparation_of_images_is_sensible(layout):
    """Mean and standard deviation are of pixels in [0, 1], and the crop is within the picture."""
    for num_classes in (10, 100, 1000):
        p = layout.preprocessing(num_classes)
        assert len(p.mean) == len(p.std) == 3
        assert all(0.3 < m < 0.6 for m in p.mean)
        assert all(0.15 < s <= 0.5 for s in p.std)
        assert p.resize is None or p.resize >= p.size
        assert p.interpolation in ('bilinear', 'bicubic')


def test_published_preparations():
    """What OpenOOD and hendrycks/outlier-exposure divide by, for each set of classes."""
    found = {layout.source: layout.preprocessing for layout in LAYOUTS if layout.backbone == 'wrn'}
    assert found['OpenOOD'](10).std == (0.2470, 0.2435, 0.2616)
    assert found['OpenOOD'](100).mean == (0.5071, 0.4867, 0.4408)
    for num_classes in (10, 100):
        p = found['hendrycks/outlier-exposure'](num_classes)
        np.testing.assert_allclose(np.multiply(p.mean, 255), (125.3, 123.0, 113.9))
        np.testing.assert_allclose(np.multiply(p.std, 255), (63.0, 62.1, 66.7))
    assert found['hendrycks/outlier-exposure'](1000).mean == (0.5, 0.5, 0.5)


def test_sources_with_the_same_names_are_told_apart_by_the_user():
    given = checkpoint('torchvision')
    assert pretrained.origins({k: v.shape for k, v in given.items()}) == ['torchvision', 'timm']
    ours, theirs = (pretrained.convert(given, origin=o) for o in (None, 'timm'))
    assert (ours.source, theirs.source) == ('torchvision', 'timm')
    assert ours.digest == theirs.digest
    assert (ours.preprocessing.resize, theirs.preprocessing.resize) == (256, 235)
    with pytest.raises(UserError, match="'tim' is not known. Did you mean 'timm'"):
        pretrained.convert(given, origin='tim')


def test_the_container_and_its_wrappers_change_nothing(tmp_path):
    given = checkpoint()
    want = pretrained.convert(given)
    np.savez(tmp_path / 'a.npz', **{f'module.{k}': v for k, v in given.items()})
    safetensors.numpy.save_file(given, tmp_path / 'a.safetensors')
    wrapped = {f'_orig_mod.model.{k}': np.float64(v) for k, v in reversed(given.items())}
    np.savez_compressed(tmp_path / 'b.npz', **wrapped)
    for name in ('a.npz', 'a.safetensors', 'b.npz'):
        same(pretrained.load(tmp_path / name), want)


def test_the_digest_is_of_the_numbers_and_of_the_network():
    given = checkpoint()
    want = pretrained.convert(given).digest
    assert len(want) == 64
    given['layer1.0.conv1.weight'][0, 0, 0, 0] += 1e-6
    assert pretrained.convert(given).digest != want
    padded, convolved = ({'name': 'resnet', 'shortcut': s} for s in ('pad', 'conv'))
    assert pretrained._digest(padded, {}) != pretrained._digest(convolved, {})


def test_what_is_saved_is_loaded(tmp_path, network):
    _, found = network
    pretrained.save(tmp_path / 'new' / 'folder', found)
    same(pretrained.load(tmp_path / 'new' / 'folder'), found)
    assert sorted(os.listdir(tmp_path / 'new' / 'folder')) == ['model.json', 'weights.safetensors']


def test_a_save_that_stops_half_way_does_not_load(tmp_path, monkeypatch):
    """Neither a first one nor one over an earlier save; done again, both do."""
    first, second = (pretrained.convert(checkpoint(s)) for s in ('OpenOOD', RESNET))
    replace = os.replace

    def killed(source, target):
        if str(target).endswith('model.json'):
            raise KeyboardInterrupt
        replace(source, target)

    for found, message in ((first, 'interrupted'), (second, 'does not fit')):
        monkeypatch.setattr(os, 'replace', killed)
        with pytest.raises(KeyboardInterrupt):
            pretrained.save(tmp_path, found)
        with pytest.raises(UserError, match=message):
            pretrained.load(tmp_path)
        monkeypatch.undo()
        pretrained.save(tmp_path, found)
        same(pretrained.load(tmp_path), found)


def test_a_folder_whose_numbers_were_changed_does_not_load(tmp_path):
    found = pretrained.convert(checkpoint())
    pretrained.save(tmp_path, found)
    weights = safetensors.numpy.load_file(tmp_path / 'weights.safetensors')
    weights['params/head/bias'] = weights['params/head/bias'] + 1.0
    safetensors.numpy.save_file(weights, tmp_path / 'weights.safetensors')
    with pytest.raises(UserError, match='other numbers'):
        pretrained.load(tmp_path)
    weights['params/head/bias'] = np.zeros(CLASSES + 1, np.float32)
    del weights['params/head/kernel']
    safetensors.numpy.save_file(weights, tmp_path / 'weights.safetensors')
    with pytest.raises(UserError, match=r'params/head/kernel +missing +\(16, 5\)'):
        pretrained.load(tmp_path)


@pytest.mark.parametrize('facts', ['{', '[]', '{}', '{"backbone": {}, "preprocessing": {}}'])
def test_a_folder_with_other_facts_does_not_load(tmp_path, facts):
    pretrained.save(tmp_path, pretrained.convert(checkpoint()))
    (tmp_path / 'model.json').write_text(facts)
    with pytest.raises(UserError, match=r'model\.json is not what'):
        pretrained.load(tmp_path)


def test_a_folder_of_a_network_that_is_unknown_does_not_load(tmp_path):
    pretrained.save(tmp_path, pretrained.convert(checkpoint()))
    facts = json.loads((tmp_path / 'model.json').read_text())
    facts['backbone']['name'] = 'resent'
    (tmp_path / 'model.json').write_text(json.dumps(facts))
    with pytest.raises(UserError, match="'resent' is not known. Did you mean 'resnet'"):
        pretrained.load(tmp_path)


def refused(given):
    with pytest.raises(UserError) as caught:
        pretrained.convert(given)
    return str(caught.value)


def test_missing_unused_and_misshapen_names_are_one_table():
    given = checkpoint()
    del given['layer2.0.bn1.running_mean']
    given['head2.weight'] = np.zeros((3, 16), np.float32)
    given['layer1.0.conv1.weight'] = np.zeros((4, 4, 5, 5), np.float32)
    given['layer1.0.conv2.weight'] = np.zeros(4, np.float32)  # of another rank
    given['bn1.weight'] = np.full(4, np.nan, np.float32)
    message = refused(given)
    rows = [line.split(None, 1) for line in message.splitlines() if line.startswith('  ')]
    assert {name: ' '.join(rest.split()) for name, rest in rows} == {
        'name': 'here expected',
        'layer2.0.bn1.running_mean': 'missing (8,)',
        'head2.weight': '(3, 16) unused',
        'layer1.0.conv1.weight': '(4, 4, 5, 5) (4, 4, 3, 3)',
        'layer1.0.conv2.weight': '(4,) (4, 4, 3, 3)',
        'bn1.weight': 'not finite finite numbers',
    }
    assert RESNET in message


def test_a_head_for_other_features():
    message = refused(checkpoint() | {'linear.weight': np.zeros((CLASSES, 64), np.float32)})
    assert 'linear.weight  (5, 64)               (5, 16)' in message


def test_a_network_without_a_last_layer():
    given = {k: v for k, v in checkpoint().items() if not k.startswith('linear')}
    assert 'no last layer (linear.weight, linear.bias)' in refused(given)


def test_a_long_table_is_cut():
    """One layer less in block 2 and one in block 3, of ten arrays each, is twenty names."""
    given = checkpoint('hendrycks/outlier-exposure')
    less = ('block2.layer.1.', 'block3.layer.1.')
    message = refused({k: v for k, v in given.items() if not k.startswith(less)})
    assert message.count('missing') == 12
    assert '... and 8 more like these' in message


@pytest.mark.parametrize(
    ('name', 'shape', 'looks'),
    [
        (
            'features.denseblock1.denselayer1.conv1.weight',
            (128, 64, 1, 1),
            "torchvision's DenseNet",
        ),
        ('features.0.weight', (64, 3, 3, 3), 'AlexNet or VGG'),
        ('theta', (7, 7), 'It has 1 arrays, the last matrix theta (7, 7)'),
    ],
)
def test_another_architecture_is_described(name, shape, looks):
    message = refused({name: np.zeros(shape, np.float32)})
    assert looks in message
    assert 'Nearest' not in message
    assert 'wrn (hendrycks/outlier-exposure, ' in message.splitlines()[-1]


def test_the_nearest_network_and_its_layers_that_disagree():
    """A DenseNet without bottlenecks has no second convolution in a layer."""
    given = checkpoint('deeplearning-wisc/dice')
    given = {k: v for k, v in given.items() if '.conv2.' not in k and '.bn2.' not in k}
    message = refused(given)
    assert 'Nearest is densenet by deeplearning-wisc/dice' in message
    assert 'block1.layer.#.conv2.weight' in message
    assert 'block1.layer.#.conv1.weight' not in message
    assert 'num_batches_tracked' not in message  # is no reason


class Code:
    """What a pickle runs when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ('it-ran',)


def npz(**named):
    buffer = io.BytesIO()
    np.savez(buffer, **named)
    return buffer.getvalue()


def archive(**named):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as file:
        for name, text in named.items():
            file.writestr(name, text)
    return buffer.getvalue()


WHOLE = npz(a=np.zeros(1000))
TENSORS = safetensors.numpy.save({'a': np.zeros(1000)})
BAD = {
    'empty.npz': (b'', 'is empty'),
    'none.npz': (archive(), 'holds no arrays'),
    'text.npz': (archive(a='hello'), 'holds no arrays'),
    'truncated.npz': (WHOLE[:4000], 'truncated'),
    'flipped.npz': (WHOLE[:2000] + b'?' + WHOLE[2001:], 'truncated'),
    'page.npz': (b'<html>404</html>', 'not what its ending says'),
    'objects.npz': (npz(a=np.array([Code()])), 'Python objects.*refused'),
    'pickle.npz': (pickle.dumps(Code()), 'Python objects.*refused'),
    'truncated.safetensors': (TENSORS[:4000], 'truncated'),
    'page.safetensors': (b'<html>404</html>', 'not what its ending says'),
    'network.onnx': (b'?', "ending '.onnx' is not known"),
}


@pytest.mark.parametrize('name', BAD)
def test_files_that_are_no_checkpoints(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f'(?s)^{name}: .*{message}') as caught:
        pretrained.load(name)
    assert 'allow_pickle' not in str(caught.value)  # no advice to load it all the same
    assert os.listdir() == [name]


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match='no such file or folder'):
        pretrained.load(tmp_path / 'weights.npz')
    with pytest.raises(UserError, match='interrupted'):
        pretrained.load(tmp_path)


def test_without_pytorch_its_files_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'torch', None)
    (tmp_path / 'a.pth').write_bytes(b'?')
    with pytest.raises(UserError, match=r'jaxood\[parity\]'):
        pretrained.load(tmp_path / 'a.pth')


if importlib.util.find_spec('torch'):  # the `parity` extra

    @pytest.mark.parametrize('source', NETWORKS)
    def test_logits_are_those_of_pytorch_now(source):
        want, stored = make_classifiers.logits(source), np.load(make_classifiers.LOGITS)[source]
        np.testing.assert_allclose(want, stored, atol=1e-5 * np.abs(want).max())

    @pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model', 'net'])
    @pytest.mark.parametrize('ending', pretrained.TORCH)
    def test_pytorchs_files(tmp_path, wrapper, ending):
        import torch

        given = checkpoint()
        named = {f'module.{k}': torch.from_numpy(v) for k, v in given.items()}
        whole = {wrapper: named, 'epoch': 3} if wrapper else named
        path = tmp_path / f'a{ending}'
        torch.save(whole, path, _use_new_zipfile_serialization=ending != '.tar')
        found = pretrained.read(path)
        assert found.keys() == given.keys()
        for name, array in given.items():
            np.testing.assert_array_equal(found[name], array)

    def test_half_precision_is_widened(tmp_path):
        import torch
        from safetensors.torch import save_file

        given = {'a': torch.tensor([1.0, 1 / 3]).bfloat16()}
        torch.save(given, tmp_path / 'a.pt')
        save_file(given, tmp_path / 'a.safetensors')
        for name in ('a.pt', 'a.safetensors'):
            got = pretrained.read(tmp_path / name)['a'].astype(np.float32)
            np.testing.assert_array_equal(got, given['a'].float().numpy())

    @pytest.mark.parametrize('old', [False, True])
    def test_a_pickle_with_code_is_refused(tmp_path, monkeypatch, old):
        import torch

        monkeypatch.chdir(tmp_path)
        content = {'state_dict': {'a': torch.zeros(3)}, 'args': Code()}
        torch.save(content, 'a.pth', _use_new_zipfile_serialization=not old)
        with pytest.raises(UserError, match=r'Python objects \(.*mkdir\).*refused') as caught:
            pretrained.load('a.pth')
        assert 'set to `False`' not in str(caught.value)
        assert os.listdir() == ['a.pth']

    @pytest.mark.parametrize('old', [False, True])
    @pytest.mark.parametrize('share', [0.01, 0.5, 0.99])
    def test_a_truncated_file_of_pytorch(tmp_path, old, share):
        import torch

        path = tmp_path / 'a.pth'
        torch.save({'a': torch.zeros(9000)}, path, _use_new_zipfile_serialization=not old)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(UserError, match='truncated'):
            pretrained.load(path)

    @pytest.mark.parametrize(
        ('content', 'message'), [(3, 'holds a int'), ({'ema': {}, 'epoch': 3}, 'but ema, epoch')]
    )
    def test_a_file_of_pytorch_without_arrays(tmp_path, content, message):
        import torch

        torch.save(content, tmp_path / 'a.pth')
        with pytest.raises(UserError, match=message):
            pretrained.load(tmp_path / 'a.pth')


@pytest.fixture(scope='module')
def cifar10(real_data, tmp_path_factory):
    """(images, labels) of the mini test set: the first 100 of each class, by class."""
    folder = tmp_path_factory.mktemp('mini')
    runpy.run_path(str(real_data / 'unpack.py'))['main'](str(folder), '--mini', 'cifar10_test')
    with np.load(folder / 'cifar10_test.npz') as file:
        return file['images'], file['labels']


def standardised(found, images):
    mean, std = (np.array(v, np.float32) for v in found.preprocessing[-2:])
    return (images / np.float32(255) - mean) / std


@pytest.mark.slow
def test_real_densenet_has_the_reference_features_and_logits(real_data, cifar10):
    found = pretrained.load(real_data / 'ckpt_densenet100_cifar10.npz')
    assert found.backbone == dict(name='densenet', depth=100, growth=12, reduction=0.5)
    got = outputs(found, standardised(found, cifar10[0][:100]))
    with np.load(real_data / 'ref_densenet100_cifar10_mini.npz') as reference:
        want = reference['cifar10_test_features'][:100].astype(np.float32)  # stored as float16
        np.testing.assert_allclose(got['features'], want, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(got['logits'], reference['cifar10_test_logits'][:100], atol=1e-3)


@pytest.mark.slow
def test_real_resnet_knows_its_classes(real_data, cifar10):
    """Published: 91.73 % of the whole test set. A wrong mean or padding costs several points."""
    found = pretrained.load(real_data / 'ckpt_resnet20_cifar10.npz')
    assert (found.backbone['blocks'], found.backbone['shortcut']) == ((3, 3, 3), 'pad')
    logits = outputs(found, standardised(found, cifar10[0]))['logits']
    assert (logits.argmax(-1) == cifar10[1]).mean() == pytest.approx(0.9173, abs=0.01)


@pytest.mark.slow
def test_the_other_real_checkpoints_load(real_data, tmp_path):
    deep = pretrained.load(real_data / 'ckpt_resnet56_cifar10.npz')
    assert (deep.backbone['blocks'], deep.num_classes) == ((9, 9, 9), 10)
    dense = pretrained.load(real_data / 'ckpt_densenet100_cifar100.npz')
    assert (dense.source, dense.num_classes) == ('deeplearning-wisc/dice', 100)
    assert dense.preprocessing.std == (0.2023, 0.1994, 0.2010)
    pretrained.save(tmp_path, dense)
    same(pretrained.load(tmp_path), dense)
