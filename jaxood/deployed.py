"""A trained detector as a function of images: what `predict` runs."""

import fractions
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxood import artefacts, console, experiment, parallel
from jaxood import config as configs
from jaxood.artefacts import Store
from jaxood.data import decoding
from jaxood.errors import UserError, lookup
from jaxood.stages import common
from jaxood.stages import score as score_stage
from jaxood.stages.common import VALIDATION
from jaxood.stages.parts import scorers

COLUMNS = ('file', 'score', 'p_value', 'decision', 'class', 'threshold')


def _bank_again(config, made, folder):
    """The images that scores are fitted on, where what the network says of them is gone."""
    try:
        synthesised = made.get('synthesise')
        if 'synthesise' in score_stage.inputs(config) and not (synthesised / 'outliers').exists():
            raise UserError(f'{synthesised.folder} has no outliers any more.')
        return scorers.banked(common.seen(config, made), synthesised)
    except UserError as e:
        raise UserError(
            f'{folder}: the detector has no bank to compare images with: neither its features '
            f'(artefacts/features) nor the images that they are computed from are there. {e} Run '
            'the command that trained it again; it goes on where it was.'
        ) from e


class Detector:
    """A trained detector, its score fitted, its threshold set on held-out ID images.

    Args:
        workdir: of a finished run.
        arm, seed, score: which detector and score; None for the report's own.
        keep: share of held-out ID images that the threshold accepts.
        on_error: 'skip' gives an unreadable file a row with decision `error`, 'stop' raises.
        batch: images computed at a time.

    Raises:
        UserError: no such run, arm, seed or score, or an unfinished one.
    """

    def __init__(self, workdir, *, arm, seed, score, keep, on_error, batch):
        experiment.use_compilation_cache()
        folder = artefacts.place(workdir)
        config, made = experiment.find_run(folder, arm, seed)
        label = score or config.report.score
        known = {method.label: method for method in scorers.methods(config)}
        lookup(known, label, f'{folder}: --score')
        scores, self.on_error = made['score'], on_error
        self.classes, self.shape = scores.done['class_names'], tuple(scores.done['shape'])
        data = configs.plain(config.data)
        self.look = {k: data[k] for k in ('resize', 'interpolation') if data.get(k) is not None}
        devices = parallel.setup()  # those of this machine, wherever the run was trained
        network = score_stage.load(made, config, devices, devices.batch_size(batch))
        self.network, self.batch = network, network.rows
        self.known = np.sort(artefacts.load(scores / f'{label}/{VALIDATION}.npz')['score'])
        store = Store(scores.folder.parent.parent)
        read = lambda: _bank_again(config, made, folder)
        bank = scorers.Bank(store, network, scores.done['bank'], read)
        section = json.loads((scores / f'{label}.json').read_text())['settings']
        where = f'{folder}: score {label}'
        self.score, self.depth = scorers.fit(bank, section, where), scorers.depth_of(section, where)
        kept = math.ceil(fractions.Fraction(str(keep)) * len(self.known))
        self.threshold = float(self.known[kept - 1])

    def rows(self, files: Iterable[str]) -> Iterator[dict[str, Any]]:
        """One dict with the keys `COLUMNS` for each file, in order; a batch in memory at a time."""
        while block := list(itertools.islice(files, self.batch)):
            read = list(decoding.each(lambda i: decoding.attempt(self._read, i), block))
            good = [image for image in read if not isinstance(image, UserError)]
            decided = iter(self._decide(np.stack(good)) if good else ())
            for file, image in zip(block, read):
                if not isinstance(image, UserError):
                    yield {'file': file} | next(decided)
                elif self.on_error == 'stop':
                    raise image
                else:
                    console.say(f'jaxood: {image}')
                    yield dict.fromkeys(COLUMNS) | {'file': file, 'decision': 'error'}

    def _read(self, file):
        height, width, channels = self.shape
        size = width if width == height else None  # `fit` makes squares
        image = decoding.read(
            file, lambda picture: decoding.fit(picture, size, channels, **self.look)
        )
        if image.shape != self.shape:
            found = f'{image.shape[1]} x {image.shape[0]}'
            raise UserError(f'{file} is {found} pixels; this run takes {width} x {height} alone.')
        return image

    def _decide(self, images):
        """Rows without the file, for uint8[n, H, W, C] with n at most a batch."""
        chunks = [parallel.pad_rows(images, self.batch)]
        for out in self.network.stream(chunks):
            if self.depth is not None:
                out['restored'] = self.network.restorer.restore(out, [self.depth], self.batch)
            scores = self.score(out, chunks)
            # the conformal p-value counts the new image itself, hence + 1
            above = len(self.known) - np.searchsorted(self.known, scores, side='left')
            p_values = (above + 1) / (len(self.known) + 1)
            for score, p, k in zip(scores, p_values, out['logits'].argmax(-1)):
                yield {
                    'score': float(score),
                    'p_value': round(float(p), 6),
                    'decision': 'OOD' if score > self.threshold else 'ID',
                    'class': self.classes[k],
                    'threshold': self.threshold,
                }
