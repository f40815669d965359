"""Texts to CLIP's token ids, by the `tokenizers` library."""

import json
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxood.errors import UserError

START, END = '<|startoftext|>', '<|endoftext|>'
LENGTH = 77
# Radford et al. 2021, official code (clip/simple_tokenizer.py): what is a word
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
FILES = (
    *('vocab.json', 'merges.txt', 'tokenizer.json', 'tokenizer_config.json'),
    *('special_tokens_map.json', 'added_tokens.json'),
)


class Tokenizer:
    """Byte-pair encoding of lower-cased text. Sennrich et al. 2016 (arXiv:1508.07909).

    Attributes:
        pad: id that fills a row after its end.
        length: tokens in a row.
        size: ids there are, pseudo-words included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, pad: str = END, length: int = LENGTH):
        backend.no_padding()
        backend.no_truncation()
        for token in (START, END, pad):
            if backend.token_to_id(token) is None:
                raise UserError(f'the vocabulary has no {token!r}: it is not that of a CLIP.')
        self._backend, self.length = backend, length
        self.pad, self.end = backend.token_to_id(pad), backend.token_to_id(END)

    @property
    def size(self) -> int:
        return self._backend.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int32[B, length]: start, tokens, end, padding. Longer texts are cut, with one warning."""
        rows = [e.ids for e in self._backend.encode_batch(list(texts), add_special_tokens=True)]
        if long := [i for i, row in enumerate(rows) if len(row) > self.length]:
            more = f' (and {len(long) - 1} more of {len(rows)})' if len(long) > 1 else ''
            warnings.warn(
                f'The prompt {texts[long[0]][:60]!r}...{more} has {len(rows[long[0]])} tokens with '
                f'start and end; only the first {self.length - 1} and the end are used.',
                stacklevel=2,
            )
        last = self.length - 1
        rows = [[*row[:last], self.end] if len(row) > self.length else row for row in rows]
        rows = [row + [self.pad] * (self.length - len(row)) for row in rows]
        return np.array(rows, np.int32).reshape(-1, self.length)

    def add(self, words: Sequence[str]) -> list[int]:
        """Pseudo-words: each gets an id of its own, from `size` on in order -> their ids.

        They are found as they are written, upper and lower case, wherever they stand in a text.

        Raises:
            UserError: a word that is a token already, given twice, or begins or ends blank.
        """
        for i, word in enumerate(words):
            if word in words[:i]:
                raise UserError(f'the pseudo-word {word!r} is given twice.')
            if self._backend.token_to_id(word) is not None:
                raise UserError(f'{word!r} is a token already. Choose another, such as <{word}>.')
            if not word or word != word.strip():
                raise UserError(f'{word!r} cannot be a pseudo-word: it begins or ends blank.')
        made = [tokenizers.AddedToken(w, normalized=False, single_word=False) for w in words]
        self._backend.add_tokens(made)
        return [self._backend.token_to_id(word) for word in words]

    def ids(self, word: str) -> list[int]:
        """The ids of a word or several, without start, end and padding."""
        return self._backend.encode(word, add_special_tokens=False).ids

    def copy(self) -> 'Tokenizer':
        """Another with the same tokens: words added to one are not in the other."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        pad = self._backend.id_to_token(self.pad)
        return Tokenizer(backend, pad=pad, length=self.length)


def load(folder: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a folder with `vocab.json` and `merges.txt`, or with `tokenizer.json`.

    Raises:
        UserError: neither is there, or a file is damaged.
    """
    folder = pathlib.Path(folder)
    try:
        if (folder / 'vocab.json').exists() and (folder / 'merges.txt').exists():
            vocabulary = json.loads((folder / 'vocab.json').read_text('utf-8'))
            backend = build(vocabulary, read_merges((folder / 'merges.txt').read_text('utf-8')))
            _add(backend, folder)
        elif (folder / 'tokenizer.json').exists():
            backend = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
        else:
            raise UserError('there is neither vocab.json with merges.txt nor tokenizer.json.')
        settings = {}
        for name in ('special_tokens_map.json', 'tokenizer_config.json'):
            if (folder / name).exists():
                settings |= json.loads((folder / name).read_text('utf-8'))
    except UserError as e:
        raise UserError(f'{folder}: {e}') from e
    except Exception as e:  # whatever the parsers say of a damaged file
        raise UserError(f'{folder}: the tokenizer is damaged ({e}). Fetch it again.') from e
    pad = settings.get('pad_token', END)
    pad = pad['content'] if isinstance(pad, dict) else pad
    length = settings.get('model_max_length', LENGTH)
    try:
        return Tokenizer(backend, pad=pad, length=length if length < 10**6 else LENGTH)
    except UserError as e:
        raise UserError(f'{folder}: {e}') from e


def build(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """What transformers builds of the same vocabulary."""
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=list(merges),
            continuing_subword_prefix='',
            end_of_word_suffix='</w>',
            fuse_unk=False,
            unk_token=END,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
            normalizers.Lowercase(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior='removed', invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    ends = [(token, vocabulary.get(token, 0)) for token in (END, START)]
    backend.post_processor = processors.RobertaProcessing(
        *ends, trim_offsets=False, add_prefix_space=False
    )
    special = [token for token in (START, END) if token in vocabulary]
    backend.add_special_tokens(special)
    return backend


def learn(texts: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary in which every word of some texts is one token; other words are spelt.

    Returns:
        (token -> id, merges): bytes, bytes that end a word, merges from left to right, the tokens
        that start and end a text. The bytes' characters are GPT-2's.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(others)]
    plain = tokenizers.Tokenizer(models.BPE())
    prepared = build({token: i for i, token in enumerate((START, END))}, [])
    plain.normalizer, plain.pre_tokenizer = prepared.normalizer, prepared.pre_tokenizer
    merges = {}
    for text in texts:
        pieces = plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(text))
        for word, _ in pieces:
            left, *rest = [*word[:-1], f'{word[-1]}</w>']
            for right in rest:
                merges[left, right] = None
                left += right
    made = [left + right for left, right in merges]
    tokens = [*letters, *(f'{c}</w>' for c in letters), *dict.fromkeys(made), START, END]
    return {token: i for i, token in enumerate(tokens)}, list(merges)


def save(
    folder: pathlib.Path,
    vocabulary: dict[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    length: int = LENGTH,
) -> None:
    """Writes `vocab.json`, `merges.txt` and `tokenizer_config.json`, which `load` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {'tokenizer_class': 'CLIPTokenizer', 'model_max_length': length}
    facts |= {'bos_token': START, 'eos_token': END, 'unk_token': END, 'pad_token': END}
    lines = ['#version: 0.2', *(' '.join(pair) for pair in merges), '']
    (folder / 'vocab.json').write_text(json.dumps(vocabulary, ensure_ascii=False), 'utf-8')
    (folder / 'merges.txt').write_text('\n'.join(lines), 'utf-8')
    (folder / 'tokenizer_config.json').write_text(json.dumps(facts, indent=2) + '\n', 'utf-8')


def read_merges(text: str) -> list[tuple[str, str]]:
    """The pairs of a `merges.txt`, whose first line may be a comment."""
    lines = text.splitlines()
    lines = lines[1:] if lines and lines[0].startswith('#version') else lines
    return [tuple(line.split()) for line in lines if line.strip()]


def _add(backend, folder):
    """The pseudo-words that transformers keeps beside a vocabulary."""
    if (path := folder / 'added_tokens.json').exists():
        added = json.loads(path.read_text('utf-8'))
        backend.add_tokens(
            [
                tokenizers.AddedToken(word, normalized=False)
                for word in sorted(added, key=added.get)
                if backend.token_to_id(word) is None
            ]
        )
