"""A set of TensorFlow Datasets, read without TensorFlow."""

import difflib
import os
import re

import numpy as np

from jaxood.data import decoding, tfds_archives
from jaxood.data.examples import Examples, Lazy
from jaxood.errors import UserError, unknown


def tfds(
    *,
    dataset: str,
    train: str | None = None,
    test: str | None = None,
    label: str = 'label',
    data_dir: str | None = None,
    archives: str | None = None,
    root: str | None = None,
    size: int | None = None,
    resize: int | str | None = None,
    interpolation: str = 'bilinear',
    channels: int | None = None,
    on_error: str = 'stop',
    memory_limit: int = 2 * 2**30,
) -> dict[str, Examples]:
    """A set of TensorFlow Datasets with a feature `image`, such as 'cifar10'.

    It is prepared first if need be: downloaded, checked against its published SHA-256, and written
    to `data_dir`. For 'cifar10', 'cifar100' and 'svhn_cropped' that needs no TensorFlow; most other
    stock sets need it for this (`pip install 'jaxood[data]'`), but not for reading.

    Args:
        train: a split, slices such as 'train[:10%]' too. By default 'train'.
        test: a split. By default 'test', or else 'validation'. If the set has, or the call names,
            only one of the two, that is returned as 'all'.
        label: the feature with the classes; a set without it has no labels.
        data_dir: where prepared sets lie; TFDS' own default is ~/tensorflow_datasets.
        archives: folder with the archives as published, for machines without internet; the three
            sets above are also downloaded to it. By default `data_dir`/downloads.
        on_error, memory_limit: as for a folder of images.

    Raises:
        UserError: an unknown set, split or feature, a set that cannot be prepared here, images of
            many sizes without `size`.
    """
    look = dict(size=size, resize=resize, interpolation=interpolation, channels=channels)
    decoding.check(**look, on_error=on_error)
    builder = _prepared(
        dataset,
        data_dir and decoding.resolve(data_dir, root),
        archives and decoding.resolve(archives, root),
    )
    shape = _shape(builder, size, channels)
    class_names = _class_names(builder, label)
    splits = _splits(builder, train, test)
    sources = {name: _open(builder, split) for name, split in splits.items()}
    lazy = sum(map(len, sources.values())) * int(np.prod(shape)) > memory_limit

    examples = {}
    for name, source in sources.items():
        where, rows = f'{builder.info.full_name}, {splits[name]}', np.arange(len(source))
        read = _reader(source, label if class_names else None, where, look)
        if lazy:
            bare = _open(builder, splits[name], images=False)
            labels = [r.get(label) for r in decoding.each(bare.__getitem__, rows)]
            marks = [f'{where} {row}' for row in rows]  # a version of a TFDS set never changes
            decode = lambda row, read=read: read(row)[1]
            store = Lazy(decode, marks, rows, shape, on_error, repr(look))
        else:
            pairs = (pair for _, pair in decoding.readable(read, rows, on_error))
            labels, store = decoding.stack(pairs, len(rows), shape)
        if not store.shape[0]:
            raise UserError(f'{where}: there are no images, or none can be read.')
        labels = _checked(labels, where) if class_names else None
        examples[name] = Examples(store, labels, class_names)
    return examples


def _reader(source, label, where, look):
    """row -> (label, uint8[H, W, C])"""
    from PIL import Image  # noqa: PLC0415

    def read(row):
        try:
            record = source[row]
            pixels = record['image']
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            return record.get(label), decoding.fit(picture, **look)
        except Exception as e:  # Pillow's decoders raise all kinds
            raise UserError(
                f"{where}, row {row} cannot be read: {e}. Set on_error='skip' to leave such out."
            ) from e

    return read


def _prepared(dataset, data_dir, archives):
    """The set's builder, once its files are there."""
    import tensorflow_datasets  # noqa: PLC0415 - slow, and only needed here

    def builder(**keywords):
        return tensorflow_datasets.builder(dataset, data_dir=data_dir, **keywords)

    try:
        stock = builder()
    except (ValueError, ImportError, AssertionError) as e:  # no such set, or it is written in TF
        known = tensorflow_datasets.list_builders(with_community_datasets=False)
        name = re.split('[/:]', dataset)[0]
        if name in known:
            raise UserError(f'dataset={dataset!r}: {e}') from e
        near = ', '.join(difflib.get_close_matches(name, known)) or 'none'
        raise UserError(
            f'dataset={dataset!r} is not known to TensorFlow Datasets. Near: {near}. All: '
            'https://www.tensorflow.org/datasets/catalog/overview'
        ) from e
    if stock.is_prepared():
        return stock
    folder = archives or os.path.normpath(os.path.join(stock.data_dir, '../../downloads'))
    if dataset in tfds_archives.BUILDERS:
        without_tensorflow = tfds_archives.builder(dataset, folder)
        fresh = without_tensorflow(data_dir=data_dir, file_format='array_record')
        hint = f'Delete what is wrong in {folder}, or put the published archives there.'
    else:
        fresh = builder(file_format='array_record')
        hint = (
            "Most stock sets need TensorFlow for it: pip install 'jaxood[data]'. Reading needs "
            "none, so another machine can prepare it, with file_format='array_record'."
        )
    options = tensorflow_datasets.download.DownloadConfig(manual_dir=folder, try_download_gcs=False)
    try:
        fresh.download_and_prepare(download_config=options)
    except UserError:
        raise
    except Exception as e:  # whatever a builder runs into
        raise UserError(
            f'{dataset} is not prepared in {stock.data_dir}, and preparing it failed: '
            f'{type(e).__name__}: {e}\n{hint}'
        ) from e
    return builder()


def _open(builder, split, *, images=True):
    """The records of a split, in any order; without images, their other features only."""
    import tensorflow_datasets  # noqa: PLC0415

    skip = None if images else {'image': tensorflow_datasets.decode.SkipDecoding()}
    try:
        return builder.as_data_source(split=split, decoders=skip)
    except NotImplementedError as e:
        raise UserError(
            f'{builder.data_dir} was prepared as {builder.info.file_format.value}, which only '
            'TensorFlow reads. Give another data_dir, or convert it where TensorFlow is: '
            'tfds.builder(..., file_format="array_record").download_and_prepare().'
        ) from e
    except ValueError as e:  # no such split
        known = list(builder.info.splits)
        raise UserError(unknown(f'{builder.info.full_name}: split {split!r}', split, known)) from e


def _splits(builder, train, test):
    """{'train': split, 'test': split}, or {'all': split}."""
    there = list(builder.info.splits)
    if train is None and test is None:
        train = 'train' if 'train' in there else None
        test = next((s for s in ('test', 'validation') if s in there), None)
        if train is None and test is None:
            raise UserError(
                f'{builder.info.full_name} has the splits {", ".join(there)}: say which to take '
                'with train=... and test=...'
            )
    if train is None or test is None:
        return {'all': train or test}
    return {'train': train, 'test': test}


def _shape(builder, size, channels):
    """(H, W, C) of the fitted images, which the set's description tells."""
    features = builder.info.features
    if 'image' not in features:
        raise UserError(
            f"{builder.info.full_name} has no feature 'image', only {', '.join(features)}."
        )
    height, width, depth = features['image'].shape
    if size is None and (height is None or width is None):
        raise UserError(
            f'{builder.info.full_name} has images of many sizes. Set size (such as size=32).'
        )
    if features['image'].np_dtype != np.uint8:
        raise UserError(f'{builder.info.full_name} has images that are not of 8 bits.')
    return size or height, size or width, channels or depth


def _class_names(builder, label):
    features = builder.info.features
    if label in features:
        has_names = getattr(features[label], 'num_classes', None)  # a ClassLabel
        return tuple(features[label].names) if has_names else ()
    if label != 'label':
        known = list(features)
        raise UserError(unknown(f'{builder.info.full_name}: label={label!r}', label, known))
    return ()


def _checked(labels, where):
    labels = np.array(labels, np.int32)
    if labels.min() < 0:
        raise UserError(
            f'{where}: row {labels.argmin()} has no label, as the test images of a contest. Name '
            "another split, such as test='validation'."
        )
    return labels
