"""Looks up the words near the ID classes and keeps those near ID images: what will be rendered.

DOG's candidates and anchors (`synthesis.anchors`), over a vocabulary (`data.wordnet`) of which no
word shows an ID class. Ends in a listing, and in what rendering will take, before anything is.
"""

import csv
import functools
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np

from jaxood import artefacts, console
from jaxood import config as configs
from jaxood.artefacts import Artefact, Store
from jaxood.data import wordnet
from jaxood.errors import ConfigError, UserError
from jaxood.stages import common, learn_tokens
from jaxood.stages.common import Context
from jaxood.stages.parts import clips, texts
from jaxood.synthesis import anchors as rules

VERSION = 1
SEES = 'id'
ACROSS = False
NEEDS = ('words', 'tokens')
PUBLISHED = ('words.csv',)
WHERE = 'config.words'
OWN = configs.SECTIONS['words']  # keys of the stage; the others are the vocabulary's
TOLERANCE = 0.02  # how far two text encoders' tables may lie apart: one may have been a float16
SHOWN, CLASSES = 8, 20  # words of a class, and classes, on the terminal
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the candidates, in a message


def applies(config) -> bool:
    return config.words.name != 'none'


def inputs(config) -> tuple[str, ...]:
    learns = ('learn_tokens',) if learn_tokens.applies(config) else ()
    return common.labelling(config) + texts.inputs(config) + learns


def needs_labels(config) -> bool:
    return True


def settings(config) -> dict:
    """Vocabulary and CLIP by their contents, so that files may move."""
    own = {k: v for k, v in configs.plain(config.words).items() if k in OWN and k != 'clip'}
    used = common.settings(config, 'dtype') | {'words': own | learn_tokens.called(config)}
    contents = {'vocabulary': vocabulary(config).digest, 'clip': clips.digest(config)}
    return used | contents | texts.settings(config)


def check(config) -> None:
    c = config.words
    common.check_name(learn_tokens.METHODS, config.tokens.name, 'config.tokens.name')
    texts.check(config)
    clips.check(config)
    vocabulary(config)
    configs.whole(c, WHERE, 'k')
    configs.within(c, WHERE, 'eta', 0.0, 1.0)
    configs.within(c, WHERE, 'keep', 0.0, 1.0)
    configs.true_or_false(c, WHERE, 'collisions')
    common.check_name(rules.RULES, c.rule, f'{WHERE}.rule')
    if c.get('threshold') is not None:
        configs.within(c, WHERE, 'threshold', -1.0, 2.0)
    if not isinstance(c.template, str) or c.template.count('{}') != 1:
        raise ConfigError(
            f"{WHERE}.template={c.template!r} must have one {{}}: 'a photo of a {{}}'."
        )


def fits(config, data, devices) -> None:
    found, classes = vocabulary(config), learn_tokens.names(config, data)
    dropped = collisions(config, found, classes)
    if len(dropped) == len(found.words):
        raise ConfigError(
            f'{WHERE}: none of the {len(found.words)} words survives the collision filter, for '
            f'each means an ID class ({found.words[0]}: {dropped[found.words[0]]}). Give a larger '
            f'vocabulary, or set {WHERE}.collisions=False.'
        )
    if data.shape[-1] != 3:
        raise ConfigError(
            f'config.data: images of {data.shape[-1]} channel(s), CLIP sees 3. Set '
            'config.data.channels=3.'
        )


def vocabulary(config) -> wordnet.Vocabulary:
    """The words of `config.words`; read once a process."""
    section = configs.plain(config.words)
    if section['name'] == 'captions' and not section.get('names'):
        if config.get('pipeline') is None or not configs.plain(config.pipeline.get('names')):
            raise ConfigError(
                f'{WHERE}.names is not set: what do the captions of the generator call its '
                f"classes? Set {WHERE}.names=('zero', 'one', ...), or config.pipeline.names."
            )
        section['names'] = configs.plain(config.pipeline.names)
    return _vocabulary(configs.freeze(section))


@functools.lru_cache(maxsize=2)
def _vocabulary(section):
    section = {k: v for k, v in section if k not in OWN}
    return configs.build(wordnet.VOCABULARIES, section, WHERE)


def collisions(config, found: wordnet.Vocabulary, classes: Sequence[str]) -> dict[str, str]:
    """The words that are dropped before anything is compared -> why."""
    return found.collisions(classes) if config.words.collisions else {}


def run(context: Context) -> dict:
    config, data = context.config, context.data
    c, found = config.words, vocabulary(config)
    classes = learn_tokens.names(config, data)
    dropped = collisions(config, found, classes)
    _say_unknown(found, classes)
    clip = clips.load(config, context.inputs, context.devices, context.num_rows())
    prompts = [c.template.format(word) for word in found.words]
    named = clip.ids(clip.tokenizer([c.template.format(name) for name in classes]))
    learns = learn_tokens.applies(config)
    own = inverted(config, clip, context.inputs) if learns else named
    words = clip.prompts(context.store, prompts, f'prompts, {context.what}')
    images = clip.images(context.store, data.id.train, f'images, {context.what}')
    allowed = np.array([word not in dropped for word in found.words])
    if c.k > allowed.sum():
        console.say(f'{WHERE}.k={c.k}: there are {allowed.sum()} words, and each is a candidate')
    lists, collided, nearest = [], [], []
    for y, similarity in enumerate(rules.similarities(own, words)):
        places = rules.candidates(similarity, allowed, c.k)
        lists.append([(int(w), float(similarity[w])) for w in places])
        near = np.flatnonzero(~allowed & (similarity >= similarity[places[-1]]))
        collided.append([(int(w), float(similarity[w])) for w in near])
        nearest.append(_nearest(found, classes, similarity, named @ own[y]))
    union = np.array(sorted({w for places in lists for w, _ in places}))
    values = rules.values(words[union], images, data.id.train.labels, eta=c.eta, rule=c.rule)
    value = dict(zip(union.tolist(), values.tolist()))
    limit = c.get('threshold')
    limit = rules.threshold(values, keep=c.keep) if limit is None else limit
    check_anchors(classes, [[value[w] for w, _ in places] for places in lists], values, limit)
    kept = [
        [(found.words[w], round(s, 6), round(value[w], 6)) for w, s in places if value[w] <= limit]
        for places in lists
    ]
    table = listing(found.words, classes, lists, collided, value, limit, dropped)
    artefacts.write(context.artefact / 'words.csv', table)
    right = np.mean([found.mean_the_same(near[0], name) for near, name in zip(nearest, classes)])
    facts = {
        'classes': classes,
        'threshold': limit,
        'vocabulary': len(found.words),
        'collisions': len(dropped),
        'candidates': len(union),
        'kept': int(np.sum(values <= limit)),
        'images': len(data.id.train),
        'nearest': dict(zip(classes, nearest)),
        'nearest_is_name': round(float(right), 4),
    }
    artefacts.write(
        context.artefact / 'anchors.json', json.dumps(facts | {'anchors': kept}, indent=1) + '\n'
    )
    return facts


def inverted(config, clip: clips.Clip, made: Mapping[str, Artefact]) -> np.ndarray:
    """T(prompt(s_y)) of every class, float32[C, P].

    Raises:
        UserError: CLIP's text encoder is not the generator's, so that the vectors mean nothing.
    """
    vectors = learn_tokens.vectors(made['learn_tokens'])
    table = np.asarray(learn_tokens.embeddings(clip.params['text']))
    ours = np.asarray(learn_tokens.embeddings(texts.load(config, made).params['text_encoder']))
    if table.shape != ours.shape or np.abs(table - ours.astype(np.float32)).max() > TOLERANCE:
        raise UserError(
            f'{clips.WHERE}={config.words.get("clip")!r}: its text encoder is not that of the '
            f'generator (token vectors {table.shape} and {ours.shape}), so the pseudo-words mean '
            'nothing to it. Stable Diffusion 1.x has that of openai/clip-vit-large-patch14.'
        )
    _, ids = learn_tokens.prompts(clip.tokenizer, len(vectors), (config.words.template,))
    return clip.ids(ids[:, 0], vectors)


def _nearest(found, classes, similarity, to_names):
    """(the word most similar to a class, how much): of the whole vocabulary and the class names."""
    word, name = int(np.argmax(similarity)), int(np.argmax(to_names))
    if similarity[word] >= to_names[name]:
        return found.words[word], round(float(similarity[word]), 4)
    return classes[name], round(float(to_names[name]), 4)


def _say_unknown(found, classes):
    if found.above and (missing := [name for name in classes if not found.find(name)]):
        console.say(
            f'{WHERE}: the vocabulary has no {", ".join(missing[:CLASSES])}, so synonyms and kinds '
            'of these are not dropped'
        )


def check_anchors(
    classes, own: Sequence[Sequence[float]], values: np.ndarray, limit: float
) -> None:
    """Raises a UserError unless every class has an anchor; it says which λ would keep how many.

    Args:
        own: the values of each class's candidates.
        values: of all candidates, each once.
    """
    best = np.array([min(mine) for mine in own])
    empty = np.flatnonzero(best > limit)
    if not empty.size:
        return
    count = lambda at: int(np.sum(values <= at))
    levels = [rules.threshold(values, keep=share) for share in SHARES]
    kept = ', '.join(f'{at:.4f} ({count(at)})' for at in levels)
    which = 'all classes' if len(empty) == len(own) else f'the class {classes[empty[0]]!r}'
    raise UserError(
        f'the anchors of {which} are none ({len(empty)} of {len(own)} classes): all candidates '
        f'lie above λ = {limit:.4f}. So many of the {len(values)} would be kept by λ = {kept}; '
        f'every class has one from {best.max():.4f} ({count(best.max())}) on. Set '
        f'{WHERE}.threshold, or raise {WHERE}.keep or {WHERE}.k.'
    )


def listing(words, classes, lists, collided, value, limit, dropped) -> str:
    """The CSV: each class's candidates, best first, and what collided among them."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator='\n')
    rows.writerow(('class', 'word', 'similarity', 'value', 'kept', 'why_not'))
    for name, places, others in zip(classes, lists, collided):
        for w, similarity in sorted(places + others, key=lambda p: (-p[1], p[0])):
            why, d = dropped.get(words[w], ''), value.get(w)
            if not why and d > limit:
                why = f'value above {limit:.4f}'
            shown = '' if words[w] in dropped else f'{d:.4f}'
            rows.writerow((name, words[w], f'{similarity:.4f}', shown, 'no' if why else 'yes', why))
    return out.getvalue()


def anchors(artefact: Artefact) -> list[list[tuple[str, float]]]:
    """The (word, similarity) pairs of each class, most similar first, of a finished stage."""
    found = json.loads((artefact / 'anchors.json').read_text())['anchors']
    return [[(word, similarity) for word, similarity, _ in kept] for kept in found]


def show(artefact: Artefact, config) -> None:
    """Says which words each class got, which not and why, and what rendering them will take."""
    done = artefact.done
    rows = list(csv.DictReader(io.StringIO((artefact / 'words.csv').read_text())))
    console.say(
        f'words: {done["vocabulary"]}, {done["collisions"]} of them mean an ID class; '
        f'{done["candidates"]} candidates, {done["kept"]} kept (λ = {done["threshold"]:.4f})'
    )
    for name in done['classes'][:CLASSES]:
        own = [row for row in rows if row['class'] == name]
        kept = [row for row in own if row['kept'] == 'yes']
        far = [row for row in own if row['why_not'].startswith('value')]
        out = [row for row in own if row['kept'] == 'no' and row not in far]
        near, close = done['nearest'][name]
        console.say(f'  {name} (nearest: {near} {close:.3f})')
        said = lambda row: f'{row["word"]} {float(row["similarity"]):.3f}'
        console.say(f'    kept {len(kept)}: {_some(kept, said)}')
        console.say(f'    far from images {len(far)}: {_some(far, said)}')
        said = lambda row: f'{row["word"]} ({row["why_not"]})'
        console.say(f'    collided {len(out)}: {_some(out, said)}')
    if len(done['classes']) > CLASSES:
        console.say(f'  ... {len(done["classes"]) - CLASSES} more classes in words.csv')
    console.say(estimate(config, done, Store(artefact.folder.parent.parent)))


def _some(rows, said):
    return ', '.join(map(said, rows[:SHOWN])) + (', ...' if len(rows) > SHOWN else '')


def estimate(config, done: Mapping, store: Store) -> str:
    """How many images there are to be, and how long that will take at the speed of earlier ones."""
    each = {'count': 1, 'per_image': done['images'], 'per_class': len(done['classes'])}
    asked = config.get('outliers') or {}
    images = next((asked[k] * n for k, n in each.items() if asked.get(k) is not None), None)
    if images is None or config.get('sampler') is None:
        return 'rendering: config.outliers and config.sampler do not say how many images'
    calls = config.sampler.steps * (1 if config.sampler.guidance == 0.0 else 2)
    speed = store.mean('synthesise', 'images_per_s')
    hours = 'not known yet' if speed is None else f'{images / speed / 3600:.2g} (at {speed:.3g}/s)'
    return f'rendering: {images} images, {images * calls} U-Net evaluations, hours: {hours}'
