"""Words, and which of them mean an ID class: WordNet's nouns, or lists without meanings.

`VOCABULARIES` maps a name to a function of keywords only, which returns a `Vocabulary`.
"""

import collections
import dataclasses
import functools
import gzip
import hashlib
import itertools
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jaxood.data import captions as composed
from jaxood.errors import UserError, unknown

# How the plural of a noun ends -> its singular: morphy(7WN), "Rules of Detachment"; ves as in NLTK.
DETACHED = (
    *(('s', ''), ('ses', 's'), ('ves', 'f'), ('xes', 'x'), ('zes', 'z'), ('ches', 'ch')),
    *(('shes', 'sh'), ('men', 'man'), ('ies', 'y')),
)
PLACES = ('', 'dict', 'wordnet', 'corpora/wordnet')  # of data.noun, below what a user names
ARCHIVES = ('wordnet.zip', 'corpora/wordnet.zip')  # as NLTK downloads it
COLUMNS = ('synset', 'members', 'hypernyms')  # of a table of synsets


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Words that may be rendered.

    Attributes:
        words: in alphabetical order, each once, in lower case: CLIP's tokenizer knows no other.
        senses: word -> its synsets; lists without meanings have none.
        above: synset -> its direct hypernyms (of an instance: what it is an instance of).
    """

    words: tuple[str, ...]
    senses: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    above: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of words and meanings, in hex."""
        sha = hashlib.sha256()
        for word in self.words:
            sha.update(f'{word}\t{"|".join(self.senses.get(word, ()))}\n'.encode())
        for synset in sorted(self.above):
            sha.update(f'{synset}\t{"|".join(self.above[synset])}\n'.encode())
        return sha.hexdigest()

    @functools.cached_property
    def spellings(self) -> dict[str, list[str]]:
        """`squeezed` -> the words that are written so."""
        found = collections.defaultdict(list)
        for word in self.words:
            found[squeezed(word)].append(word)
        return dict(found)

    @functools.cached_property
    def members(self) -> dict[str, list[str]]:
        """Synset -> its words."""
        found = collections.defaultdict(list)
        for word, synsets in self.senses.items():
            for synset in synsets:
                found[synset].append(word)
        return dict(found)

    @functools.cached_property
    def below(self) -> dict[str, list[str]]:
        """Synset -> its direct hyponyms and instances."""
        found = collections.defaultdict(list)
        for synset, hypernyms in self.above.items():
            for hypernym in hypernyms:
                found[hypernym].append(synset)
        return dict(found)

    def find(self, name: str) -> list[str]:
        """The words that a class name is: as it is written, or the singular of a plural.

        Spaces, underscores, hyphens and capitals make no difference; [] where there is none.
        """
        word = squeezed(name)
        singulars = (word.removesuffix(a) + b for a, b in DETACHED if word.endswith(a))
        for spelling in (word, *singulars):
            if spelling in self.spellings:
                return self.spellings[spelling]
        return []

    def collisions(self, names: Iterable[str]) -> dict[str, str]:
        """The words that would show an ID class -> why.

        A word is dropped if it is a class name, shares a synset with one, or is a hyponym, however
        far below, or a direct hypernym of one, in any of the name's senses. Our choice; without it
        the words nearest to a class are the class.
        """
        found = {}
        for name in names:
            own = self.find(name)
            found |= {word: f'the class {name}' for word in own if word not in found}
            synsets = dict.fromkeys(s for word in own for s in self.senses.get(word, ()))
            hypernyms = dict.fromkeys(h for s in synsets for h in self.above.get(s, ()))
            for group, why in (
                (synsets, f'a synonym of {name}'),
                (self._all_below(synsets), f'a kind of {name}'),
                (hypernyms, f'what {name} is a kind of'),
            ):
                words = itertools.chain.from_iterable(self.members.get(s, ()) for s in group)
                found |= {word: why for word in words if word not in found}
        return found

    def mean_the_same(self, word: str, name: str) -> bool:
        """Whether a word is a class name or a synonym of it."""
        own = self.find(name)
        if word in own or squeezed(word) == squeezed(name):
            return True
        synsets = {s for other in own for s in self.senses.get(other, ())}
        return bool(synsets & {*self.senses.get(word, ())})

    def _all_below(self, synsets):
        found, ahead = {}, list(synsets)
        while ahead:
            for synset in self.below.get(ahead.pop(), ()):
                if synset not in found:
                    found[synset] = None
                    ahead.append(synset)
        return found


def normalised(text: str) -> str:
    """A word as it stands in a prompt: lower case, underscores as spaces."""
    return ' '.join(text.replace('_', ' ').lower().split())


def squeezed(text: str) -> str:
    """A word without what writers disagree about: 'Lawn-mower', 'lawn_mower' -> 'lawnmower'."""
    return re.sub(r'[\s_\-]+', '', text.lower())


def nouns(*, path: str) -> Vocabulary:
    """WordNet's nouns. WordNet 3.0 has 117,798 lemmas in 82,115 synsets.

    Args:
        path: WordNet's folder (with `dict/data.noun`), NLTK's (`nltk_data`, or its `corpora`, also
            with `wordnet.zip` as it was downloaded), the file `data.noun`, or a table of synsets
            with tabs, `.tsv` or `.tsv.gz`, whose columns `synset`, `members` and `hypernyms` (the
            latter two separated by |) are read.

    Raises:
        UserError: there is no such thing, or it is damaged.
    """
    place = _there(path)
    if place.is_dir():
        return _collect(_synsets(*_data_noun(place)))
    lines = _lines(place)
    if place.name.startswith('data.noun'):
        return _collect(_synsets(lines, place))
    return _collect(_table(lines, place))


def word_list(*, path: str) -> Vocabulary:
    """A text file with a word or several on each line, perhaps gzipped; no meanings are known."""
    place = _there(path)
    words = {normalised(line) for line in _lines(place)} - {''}
    if not words:
        raise UserError(f'{place} holds no words. Write one on each line.')
    return Vocabulary(tuple(sorted(words)))


def captions(*, names: Sequence[str]) -> Vocabulary:
    """What the captions of a small generator say (`captions.captions`), without the template.

    A class over itself shows that class alone, so it means the same as its name.

    Args:
        names: what the generator's captions call its classes.
    """
    words = composed.captions(names, '{}')
    means = {word: word for word in words} | {composed.OVER.format(n, n): n for n in names}
    return Vocabulary(tuple(sorted(words)), {word: (means[word],) for word in sorted(words)})


VOCABULARIES = {'wordnet': nouns, 'list': word_list, 'captions': captions}


def _there(path):
    """The file or folder, or a UserError with the nearest that is there."""
    place = pathlib.Path(path).expanduser()
    if place.exists():
        return place
    if not place.parent.is_dir():
        raise UserError(f'{place}: there is no folder {place.parent}. Check the path.')
    raise UserError(unknown(f'{place}: this', place.name, sorted(os.listdir(place.parent))[:50]))


def _lines(place) -> list[str]:
    try:
        content = place.read_bytes()
        return (gzip.decompress(content) if place.suffix == '.gz' else content).decode().split('\n')
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise UserError(f'{place} cannot be read as UTF-8 text ({e}). Fetch it again.') from e


def _data_noun(folder):
    """(lines, where they come from) of the `data.noun` below a folder."""
    for place in PLACES:
        if (file := folder / place / 'data.noun').is_file():
            return _lines(file), file
    for name in ARCHIVES:
        if (file := folder / name).is_file():
            try:
                with zipfile.ZipFile(file) as archive:
                    return archive.read('wordnet/data.noun').decode().split('\n'), file
            except (KeyError, zipfile.BadZipFile, UnicodeDecodeError) as e:
                raise UserError(f'{file} holds no WordNet ({e}). Fetch it again.') from e
    there = ', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'
    raise UserError(
        f"{folder} holds no data.noun (it holds {there}). Name WordNet's folder, or that of NLTK's "
        'data; or a word list.'
    )


def _synsets(lines, where) -> Iterator[tuple[str, list[str], list[str]]]:
    """(synset, members, hypernyms) of the lines of `data.noun`; see wndb(5WN)."""
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith('  '):  # the licence
            continue
        fields = line.partition(' | ')[0].split()
        try:
            end = 4 + 2 * int(fields[3], 16)
            members, pointers = fields[4:end:2], fields[end + 1 :]
            above = [
                pointers[i + 1]
                for i in range(0, 4 * int(fields[end]), 4)
                if pointers[i] in ('@', '@i')
            ]
        except (IndexError, ValueError) as e:
            raise UserError(f'{where}, line {number}: it is no line of data.noun ({e}).') from e
        yield fields[0], members, above


def _table(lines, where) -> Iterator[tuple[str, list[str], list[str]]]:
    """The same of a table with a header."""
    header = lines[0].split('\t')
    if missing := [name for name in COLUMNS if name not in header]:
        raise UserError(
            f'{where} has no column {missing[0]!r} in its first line. A table of synsets has '
            f"{', '.join(COLUMNS)}, separated by tabs; a list of words is read with name='list'."
        )
    places = [header.index(name) for name in COLUMNS]
    for number, line in enumerate(lines[1:], 2):
        cells = line.split('\t')
        if not line.strip():
            continue
        if len(cells) <= max(places):
            raise UserError(f'{where}, line {number}: {len(cells)} columns, not {len(header)}.')
        synset, members, above = (cells[i] for i in places)
        yield synset, members.split('|'), above.split('|') if above else []


def _collect(synsets) -> Vocabulary:
    senses, hypernyms = collections.defaultdict(dict), {}
    for synset, members, above in synsets:
        hypernyms[synset] = tuple(above)
        for word in members:
            senses[normalised(word)][synset] = None
    return Vocabulary(tuple(sorted(senses)), {w: tuple(s) for w, s in senses.items()}, hypernyms)
