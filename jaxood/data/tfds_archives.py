"""CIFAR-10, CIFAR-100 and cropped SVHN for TensorFlow Datasets, prepared without TensorFlow.

The stock builders need TensorFlow for two things only: to open a file, and to encode a PNG. These
open it themselves and yield Pillow images. Name, version, features, keys and checksums are the
stock ones', so any program with TFDS finds the files that they leave. The archives hold plain
bytes (CIFAR's "binary version") and a MATLAB file: nothing is unpickled.
"""

import os
import tarfile
import urllib.request
from collections.abc import Iterator

import numpy as np

from jaxood import console
from jaxood.errors import UserError


def builder(dataset: str, folder: str) -> type:
    """The stock builder's class, made to work without TensorFlow.

    Its `download_and_prepare` takes the archives from `folder`, to which it downloads those that
    are missing, and raises a UserError with the address where there is no connection.
    """
    import tensorflow_datasets  # noqa: PLC0415

    stock = tensorflow_datasets.builder_cls(dataset)

    class Builder(stock, skip_registration=True):
        """As the class it derives from."""

        name = dataset
        url_infos = stock.url_infos  # the checksums, which are found by the class's file
        pkg_dir_path = stock.pkg_dir_path

        def _split_generators(self, dl_manager):
            # TFDS takes an archive from its `manual_dir`, `folder`, and compares its SHA-256.
            _fetch(dataset, folder)
            paths = dl_manager.download(_urls(dataset))
            return BUILDERS[dataset](self.info.features, paths)

    return Builder


def _fetch(dataset, folder):
    """Downloads the published archives that are not in `folder` yet."""
    for name, url in _urls(dataset).items():
        path = os.path.join(folder, name)
        if os.path.exists(path):
            continue
        console.say(f'{dataset}: downloading {url} to {path}')
        try:
            os.makedirs(folder, exist_ok=True)
            part, _ = urllib.request.urlretrieve(url, path + '.part')
            os.replace(part, path)
        except OSError as e:
            raise UserError(
                f'{dataset} is not prepared, and {url} cannot be downloaded: {e}. Download it '
                f'elsewhere and put it into {folder}, or into a folder that archives=... names.'
            ) from e


def _cifar(archive, train, test, labels):
    """Splits of a CIFAR archive; `labels` maps features to their files of names, in byte order."""

    def splits(features, paths):
        with tarfile.open(paths[archive]) as tar:
            files = {
                os.path.basename(member.name): tar.extractfile(member).read()
                for member in tar
                if member.isfile()
            }
        for feature, file in labels.items():
            features[feature].names = files[file].decode().split()
        return {
            split: _cifar_examples(split, [files[f] for f in sorted(files) if f in wanted], labels)
            for split, wanted in (('train', train), ('test', test))
        }

    return splits


def _cifar_examples(split: str, files: list[bytes], labels) -> Iterator:
    """A record is a byte for each label, then 1024 bytes each of red, green and blue."""
    from PIL import Image  # noqa: PLC0415

    records = np.frombuffer(b''.join(files), np.uint8).reshape(-1, len(labels) + 3 * 32 * 32)
    for i, record in enumerate(records):
        pixels = record[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
        yield (
            i,
            {
                **{feature: int(k) for feature, k in zip(labels, record)},
                'id': f'{split}_{i:05d}',
                'image': Image.fromarray(np.ascontiguousarray(pixels)),
            },
        )


def _svhn(features, paths):
    return {
        split: _svhn_examples(split, paths[f'{split}_32x32.mat']) for split in ('train', 'test')
    }


def _svhn_examples(split: str, path) -> Iterator:
    """X is uint8[32, 32, 3, N]; y is 1..10, 10 meaning the digit 0."""
    import scipy.io  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    data = scipy.io.loadmat(os.fspath(path))
    for i, label in enumerate(data['y'][:, 0]):
        yield (
            i,
            {
                'id': f'{split}_{i:06d}',
                'image': Image.fromarray(np.ascontiguousarray(data['X'][..., i])),
                'label': int(label) % 10,
            },
        )


def _urls(dataset):
    """File name -> address of the archives, SVHN's 1.3 GB `extra` left out."""
    import tensorflow_datasets  # noqa: PLC0415

    known = tensorflow_datasets.builder_cls(dataset).url_infos
    return {info.filename: url for url, info in known.items() if 'extra' not in info.filename}


BUILDERS = {
    'cifar10': _cifar(
        'cifar-10-binary.tar.gz',
        train=[f'data_batch_{i}.bin' for i in range(1, 6)],
        test=['test_batch.bin'],
        labels={'label': 'batches.meta.txt'},
    ),
    'cifar100': _cifar(
        'cifar-100-binary.tar.gz',
        train=['train.bin'],
        test=['test.bin'],
        labels={'coarse_label': 'coarse_label_names.txt', 'label': 'fine_label_names.txt'},
    ),
    'svhn_cropped': _svhn,
}
