"""TensorFlow Datasets without TensorFlow: read, and for the usual benchmarks prepared, too."""

import io
import json
import logging
import sys
import tarfile

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets
from tensorflow_datasets.core.download import checksums

from jaxood.data import SOURCES, tfds_archives
from jaxood.errors import UserError

CIFAR10 = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def quiet():
    tensorflow_datasets.disable_progress_bar()


def load(dataset, **keywords):
    return SOURCES['tfds'](dataset=dataset, **keywords)


def cifar(path, folder, files, names):
    """An archive in the binary layout; `files` maps names to (labels [N, L], images)."""
    with tarfile.open(path, 'w:gz') as tar:
        for name, (labels, images) in reversed(files.items()):  # no order is promised
            planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
            names = {name: np.hstack([labels, planes]).astype(np.uint8).tobytes(), **names}
        for name, data in names.items():
            entry = tarfile.TarInfo(f'{folder}/{name}')
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def publish(monkeypatch, dataset, folder):
    """Makes the checksums of the archives in `folder` the published ones."""
    stock = tensorflow_datasets.builder_cls(dataset)
    infos = dict(stock.url_infos)
    for url, info in stock.url_infos.items():
        if (folder / info.filename).exists():
            found = checksums.compute_url_info(folder / info.filename)
            infos[url] = checksums.UrlInfo(found.size, found.checksum, info.filename)
    monkeypatch.setattr(stock, 'url_infos', infos)


def draw(n, classes):
    images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return rng.permutation(np.arange(n) % classes)[:, None], images


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    files = {f'data_batch_{i}.bin': draw(4, 10) for i in range(1, 6)} | {
        'test_batch.bin': draw(6, 10)
    }
    (tmp_path / 'published').mkdir()
    names = {'batches.meta.txt': '\n'.join([*CIFAR10, '', '']).encode()}
    archive = tmp_path / 'published' / 'cifar-10-binary.tar.gz'
    cifar(archive, 'cifar-10-batches-bin', files, names)
    publish(monkeypatch, 'cifar10', tmp_path / 'published')
    train = [np.concatenate(part) for part in zip(*list(files.values())[:5])]
    return tmp_path, train, files['test_batch.bin']


class NoTensorFlow:
    """First in `sys.meta_path`: importing TensorFlow fails even where it is installed."""

    @staticmethod
    def find_spec(name, *_):
        if name == 'tensorflow':
            raise ModuleNotFoundError("No module named 'tensorflow'")


def same_pairs(examples, labels, images):
    """The same images with the same labels, in whatever order."""
    got = {
        image.tobytes(): k
        for image, k in zip(examples.take(np.arange(len(examples))), examples.labels)
    }
    return got == {image.tobytes(): k for image, k in zip(images, labels[:, 0])}


def test_cifar10_is_prepared_without_tensorflow(cifar10, monkeypatch):
    folder, train, test = cifar10
    monkeypatch.setattr(sys, 'meta_path', [NoTensorFlow, *sys.meta_path])
    got = load('cifar10', data_dir='sets', archives='published', root=str(folder))
    assert got['train'].class_names == tuple(CIFAR10)
    assert got['train'].labels.dtype == np.int32
    assert same_pairs(got['train'], *train)
    assert same_pairs(got['test'], *test)
    (folder / 'published' / 'cifar-10-binary.tar.gz').unlink()  # is not needed again
    again = load('cifar10', data_dir=str(folder / 'sets'))
    assert again['train'].digest == got['train'].digest
    stock = tensorflow_datasets.data_source('cifar10', data_dir=folder / 'sets', split='train')
    first = {record['id']: record for record in stock}[b'train_00000']
    np.testing.assert_array_equal(first['image'], train[1][0])
    assert first['label'] == train[0][0]


def test_lazily_read_is_the_same_as_in_memory(cifar10):
    places = dict(data_dir='sets', archives='published', root=str(cifar10[0]))
    here, there = (
        load('cifar10', **places, size=8, channels=1, memory_limit=limit)['train']
        for limit in (2**30, 0)
    )
    assert (here.images is None, there.images is None) == (False, True)
    rows = np.array([7, 0, 19, 7])
    np.testing.assert_array_equal(here.take(rows), there.take(rows))
    np.testing.assert_array_equal(here.labels, there.labels)
    assert here.shape == there.shape == (8, 8, 1)


def test_splits_can_be_named_and_sliced(cifar10):
    places = dict(data_dir='sets', archives='published', root=str(cifar10[0]))
    got = load('cifar10', **places, train='train[:5]', test='train[5:]')
    assert [len(got[split]) for split in ('train', 'test')] == [5, 15]
    assert len(load('cifar10', **places, test='test')['all']) == 6
    with pytest.raises(UserError, match="split 'tset' is not known. Did you mean 'test'"):
        load('cifar10', **places, test='tset')
    with pytest.raises(UserError, match=r"label='lable' is not known. Did you mean 'label'"):
        load('cifar10', **places, label='lable')
    assert load('cifar10', **places, label='id')['train'].labels is None  # no classes


def test_cifar100_has_two_kinds_of_labels(tmp_path, monkeypatch):
    coarse, images = draw(20, 20)
    fine = rng.integers(0, 100, (20, 1))
    files = {
        'train.bin': (np.hstack([coarse, fine]), images),
        'test.bin': (np.ones((2, 2)), images[:2]),
    }
    names = {
        'fine_label_names.txt': '\n'.join(f'fine{i}' for i in range(100)).encode(),
        'coarse_label_names.txt': '\n'.join(f'coarse{i}' for i in range(20)).encode(),
    }
    cifar(tmp_path / 'cifar-100-binary.tar.gz', 'cifar-100-binary', files, names)
    publish(monkeypatch, 'cifar100', tmp_path)
    places = dict(data_dir=str(tmp_path / 'sets'), archives=str(tmp_path))
    by_fine, by_coarse = (
        load('cifar100', **places, label=k)['train'] for k in ('label', 'coarse_label')
    )
    assert same_pairs(by_fine, fine, images)
    assert same_pairs(by_coarse, coarse, images)
    assert (by_fine.class_names[99], by_coarse.class_names[19]) == ('fine99', 'coarse19')


def test_svhn_is_prepared_from_its_matlab_files(tmp_path, monkeypatch):
    parts = {}
    for split, n in (('train', 12), ('test', 5)):
        labels, images = parts[split] = draw(n, 10)
        matlab = {'X': images.transpose(1, 2, 3, 0), 'y': np.where(labels == 0, 10, labels)}
        scipy.io.savemat(tmp_path / f'{split}_32x32.mat', matlab)
    publish(monkeypatch, 'svhn_cropped', tmp_path)
    got = load('svhn_cropped', data_dir=str(tmp_path / 'sets'), archives=str(tmp_path))
    assert set(got) == {'train', 'test'}
    assert got['test'].class_names == tuple('0123456789')
    assert all(same_pairs(got[split], *parts[split]) for split in got)


def test_an_archive_is_downloaded_once_and_checked(cifar10, monkeypatch):
    folder = cifar10[0]
    (url,) = tensorflow_datasets.builder_cls('cifar10').url_infos
    asked, ready = [], folder / 'published' / 'cifar-10-binary.tar.gz'

    def download(address, path):
        asked.append(address)
        with open(path, 'wb') as f:
            f.write(ready.read_bytes())
        return path, None

    monkeypatch.setattr(tfds_archives.urllib.request, 'urlretrieve', download)
    assert len(load('cifar10', data_dir=str(folder / 'a'))['train']) == 20
    assert (folder / 'a' / 'downloads' / ready.name).exists()
    ready = folder / 'other'
    ready.write_bytes(b'a page that says: log in first')
    with pytest.raises(
        UserError, match=r'(?s)NonMatchingChecksum.*Delete what is wrong in .*b/downl'
    ):
        load('cifar10', data_dir=str(folder / 'b'))
    assert asked == [url, url]


def test_without_a_connection_the_address_is_named(tmp_path, monkeypatch):
    def offline(url, path):
        raise OSError('Name or service not known')

    monkeypatch.setattr(tfds_archives.urllib.request, 'urlretrieve', offline)
    with pytest.raises(UserError, match=r'https://www\.cs\.toronto\.edu.* into .*x, or .*archives'):
        load('cifar10', data_dir=str(tmp_path), archives=str(tmp_path / 'x'))


def test_a_builder_that_needs_tensorflow_names_the_extra(tmp_path, monkeypatch):
    def prepare(self, **_):
        raise ImportError("No module named 'tensorflow'")

    stock = tensorflow_datasets.builder_cls('mnist')
    monkeypatch.setattr(stock, 'download_and_prepare', prepare)
    with pytest.raises(UserError, match=r"(?s)No module named 'tensorflow'.*jaxood\[data\]"):
        load('mnist', data_dir=str(tmp_path))


def test_files_that_only_tensorflow_reads(cifar10):
    folder = cifar10[0]
    load('cifar10', data_dir=str(folder / 'sets'), archives=str(folder / 'published'))
    (path,) = (folder / 'sets').glob('cifar10/*/dataset_info.json')
    path.write_text(json.dumps(json.loads(path.read_text()) | {'fileFormat': 'tfrecord'}))
    with pytest.raises(UserError, match='was prepared as tfrecord.*another data_dir'):
        load('cifar10', data_dir=str(folder / 'sets'))


def test_an_unreadable_record_is_named_or_left_out(cifar10, monkeypatch, caplog):
    places = dict(data_dir='sets', archives='published', root=str(cifar10[0]))
    from jaxood.data import decoding

    good, count = decoding.fit, iter(range(26))

    def fit(image, **look):
        if next(count) % 26 == 3:
            raise OSError('broken data stream')
        return good(image, **look)

    monkeypatch.setattr(decoding, 'fit', fit)
    monkeypatch.setattr(decoding, 'each', map)
    with caplog.at_level(logging.WARNING):
        got = load('cifar10', **places, on_error='skip')
    assert [len(got[split]) for split in ('train', 'test')] == [19, 6]
    assert 'cifar10/3.0.2, train, row 3 cannot be read: broken data stream' in caplog.text
    count = iter(range(26))
    with pytest.raises(UserError, match=r"row 3 cannot be read: broken.*on_error='skip'"):
        load('cifar10', **places)


def test_names_that_are_not_known():
    with pytest.raises(UserError, match=r"dataset='cifra10' is not known .*Near: .*cifar10"):
        load('cifra10')
    with pytest.raises(UserError, match=r"dataset='imagenette/nose'.*nose"):
        load('imagenette/nose')


def test_mocked_sets():
    """`tfds.testing.mock_data` invents any set from its description."""
    with tensorflow_datasets.testing.mock_data(num_examples=5):
        got = load('cifar10', train='train', test='test')
        assert [len(got[split]) for split in ('train', 'test')] == [5, 5]
        assert got['train'].shape == (32, 32, 3)
        assert len(got['train'].class_names) == 10
        grey = load('mnist', train='train')['all']
        assert grey.shape == (28, 28, 1)
        many = load('imagenet2012', train='train', size=16)['all']  # images of all sizes
        assert many.images.shape == (5, 16, 16, 3)
        assert len(many.class_names) == 1000
        with pytest.raises(UserError, match='many sizes. Set size'):
            load('imagenet2012', train='train')
