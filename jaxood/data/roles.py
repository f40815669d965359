"""Who is who: which examples train, validate and test, and which classes are held out as OOD."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxood.data.examples import Examples
from jaxood.errors import UserError, unknown


@dataclasses.dataclass(frozen=True)
class Roles:
    """The parts that a source plays in a run. No example is in two of them.

    Attributes:
        train, validation, test: ID examples, with the same K classes.
        held_out: near-OOD test set, of the classes held out; None without.
        held_out_validation: OOD set for choosing settings, of other classes; None without.
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
    test: float = 0.2,
    held_out: Sequence[str | int] = (),
    held_out_validation: Sequence[str | int] = (),
    seed: int = 0,
) -> Roles:
    """Splits a source, class by class, at random but always alike.

    Args:
        splits: a source's `{'all': ...}` or `{'train': ..., 'test': ...}`.
        validation: share of the examples (of 'train', if the source has a test split) that are for
            validation; 0 for none.
        test: share for testing; of no effect if the source has a test split.
        held_out: classes, by name or number, that leave the ID set. Their examples in 'test' (or
            'all') are the near-OOD set, those in 'train' are not used.
        held_out_validation: the same for the validation-OOD set.
        seed: of the permutations. A class is split alike whichever others are held out.

    Raises:
        UserError: a class that is not there or is named twice, classes of a set without labels,
            fewer than two ID classes left, shares that leave a role without images.
    """
    source = splits.get('train', splits.get('all'))
    if not 0 <= validation < 1 or not 0 < test < 1 or validation + test >= 1:
        raise UserError(
            f'validation={validation} and test={test} must be shares that leave something to train '
            'on: validation=0.1, test=0.2 leave 0.7.'
        )
    if 'test' in splits:
        _agree(source, splits['test'])
    near = _classes(held_out, source, 'held_out')
    tuning = _classes(held_out_validation, source, 'held_out_validation')
    for k in set(near) & set(tuning):
        raise UserError(
            f'class {source.class_names[k]!r} is both in held_out and in held_out_validation. '
            'Settings that are chosen on a class cannot be tested on it.'
        )
    outside = splits.get('test', source)
    if source.labels is None:
        id_, id_test = source, splits.get('test')
    else:
        kept = [k for k in range(len(source.class_names)) if k not in (*near, *tuning)]
        if len(kept) < 2:
            left = ', '.join(source.class_names[k] for k in kept) or 'none'
            raise UserError(
                f'a classifier needs two ID classes, and this leaves {len(kept)} ({left}). Hold '
                'fewer classes out, or give images without labels.'
            )
        id_ = source.of_classes(kept)
        id_test = splits['test'].of_classes(kept) if 'test' in splits else None

    shares = {'validation': validation} if id_test is not None else {
        'test': test, 'validation': validation
    }
    ...
