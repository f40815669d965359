"""Who is who: which examples train, validate and test, and which classes are held out as OOD."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxood.data.examples import Examples
from jaxood.errors import UserError, unknown


@dataclasses.dataclass(frozen=True)
class Roles:
    """The parts that a source's examples play in a run; none plays two.

    Attributes:
        train, validation, test: ID examples, of the same K classes.
        held_out: near-OOD test set, of the classes held out; None without any.
        held_out_validation: OOD set to choose settings on, of other classes; None without any.
    """

    train: Examples
    validation: Examples
    test: Examples
    held_out: Examples | None = None
    held_out_validation: Examples | None = None


def roles(
    splits: Mapping[str, Examples],
    *,
    validation: float = 0.1,
    validation_from: str = 'train',
    test: float = 0.2,
    held_out: Sequence[str | int] = (),
    held_out_validation: Sequence[str | int] = (),
    seed: int = 0,
) -> Roles:
    """Casts a source's examples, class by class, at random but always alike.

    Args:
        splits: a source's `{'all': ...}` or `{'train': ..., 'test': ...}`.
        validation: share of 'all' (or of 'train') that validates; 0 for an empty set.
        validation_from: 'train', or 'test' to take that share of the test split instead, for
            networks that have seen the whole train split (OpenOOD's protocol).
        test: share of 'all' that tests; of no effect if the source has a test split.
        held_out: classes, by name or number, that leave the ID set. Their examples in 'all' (or in
            'test') are the near-OOD set.
        held_out_validation: the same for the OOD set that settings are chosen on.
        seed: of the permutations. A class is cast alike whichever others are held out.

    Raises:
        UserError: a class that is not there or held out twice, classes of a set without labels,
            fewer than two classes left, shares that leave a part without images.
    """
    source = splits.get('train', splits.get('all'))
    outside = splits.get('test', source)
    if validation_from not in ('train', 'test'):
        raise UserError(f"validation_from={validation_from!r} must be 'train' or 'test'.")
    shares = {'validation': validation}
    if outside is source:
        shares['test'] = test
    if not 0 <= validation < 1 or not 0 < test < 1 or sum(shares.values()) >= 1:
        raise UserError(
            f'validation={validation} and test={test} must be shares that leave something to train '
            'on; 0.1 and 0.2 leave 0.7.'
        )
    _agree(source, outside)
    near = _classes(source, held_out, 'held_out')
    tuning = _classes(source, held_out_validation, 'held_out_validation')
    for k in sorted({*near} & {*tuning}):
        raise UserError(
            f'class {source.class_names[k]!r} is in held_out and in held_out_validation. What '
            'settings are chosen on cannot test them.'
        )

    if validation_from == 'test' and outside is not source:
        cast = _cast(outside, shares, seed)
        validates, outside = outside.subset(cast['validation']), outside.subset(cast['train'])
        parts = {'train': source, 'validation': validates, 'test': outside}
    else:
        parts = {part: source.subset(rows) for part, rows in _cast(source, shares, seed).items()}
        parts.setdefault('test', outside)
    if source.labels is not None:
        id_classes = [k for k in range(len(source.class_names)) if k not in (*near, *tuning)]
        if len(id_classes) < 2:
            raise UserError(
                f'a classifier needs two ID classes, and here it has {len(id_classes)} of '
                f'{len(source.class_names)}. Hold fewer out, or give images without labels.'
            )
        if near or tuning:
            parts = {part: examples.of_classes(id_classes) for part, examples in parts.items()}
    _check_filled(parts, validation)
    return Roles(
        **parts,
        held_out=_outliers(outside, near, 'held_out'),
        held_out_validation=_outliers(outside, tuning, 'held_out_validation'),
    )


def _cast(source, shares, seed):
    """part -> sorted rows, for the parts in `shares` and, with what is left, 'train'."""
    labels = np.zeros(len(source), int) if source.labels is None else source.labels
    rows = {part: [] for part in (*shares, 'train')}
    for k in np.unique(labels):
        order = np.random.Generator(np.random.PCG64((seed, k)))
        mine = order.permutation(np.flatnonzero(labels == k))
        counts = [int(share * len(mine) + 0.5) for share in shares.values()]
        for part, some in zip(rows, np.split(mine, np.cumsum(counts))):
            rows[part].append(some)
    return {part: np.sort(np.concatenate(some)) for part, some in rows.items()}


def _classes(source, wanted, where):
    """Numbers of the classes that are named or numbered in `wanted`, sorted."""
    wanted = (wanted,) if isinstance(wanted, (str, int)) else tuple(wanted)
    if wanted and source.labels is None:
        raise UserError(f'{where}={wanted} names classes, but the images have no labels.')
    names, numbers = source.class_names, set()
    for name in wanted:
        if name in names:
            numbers.add(names.index(name))
        elif isinstance(name, int) and 0 <= name < len(names):
            numbers.add(name)
        else:
            message = unknown(f'{where}: class {name!r}', name, names)
            raise UserError(f'{message} Name classes of this set, or () for none.')
    return sorted(numbers)


def _agree(train, test):
    """Raises UserError unless the train and the test split can be one set."""
    for what, a, b in (
        ('images of shape', train.shape, test.shape),
        ('labels', train.labels is not None, test.labels is not None),
        ('classes', train.class_names, test.class_names),
    ):
        if a != b:
            raise UserError(
                f'the train split has {what} {a}, the test split {b}. They must agree; size and '
                'channels bring images to one shape.'
            )


def _check_filled(parts, validation):
    for part, examples in parts.items():
        if len(examples) == 0 and (part != 'validation' or validation):
            raise UserError(
                f'no image is left for {part}. Give more images, or other shares (validation, '
                'test).'
            )
    train = parts['train']
    if train.labels is not None:
        counts = np.bincount(train.labels, minlength=len(train.class_names))
        if not counts.all():
            raise UserError(
                f'class {train.class_names[counts.argmin()]!r} has no image to train on. Give it '
                'some, hold it out, or take its name from the class names.'
            )


def _outliers(outside, classes, where):
    if not classes:
        return None
    examples = outside.of_classes(classes)
    if len(examples) == 0:
        names = ', '.join(examples.class_names)
        raise UserError(f'{where}: the test split has no image of {names}.')
    return examples
