"""Errors that are the user's to mend: what is wrong, where, and how to put it right.

`main`, `predict` and `convert` print a `UserError` as one message, without a traceback, and leave
with exit code 2. Anything else is a defect of jaxood and shows its traceback.
"""

import contextlib
import difflib
from collections.abc import Iterable, Mapping


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and how to mend it."""


class ConfigError(UserError):
    """A setting that cannot work, found before anything is built."""


def unknown(what: str, name: object, known: Iterable[object]) -> str:
    """The message for a name that is in no table: the nearest one, then the list."""
    known = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ''
    return f'{what} is not known.{hint} Known: {", ".join(known) or "none"}.'


def lookup(table: Mapping, name: str, what: str):
    """`table[name]`, or a `UserError` that starts with `what` and names the nearest entry."""
    if name not in table:
        raise UserError(unknown(f'{what} {name!r}', name, table))
    return table[name]


@contextlib.contextmanager
def blame(where: str):
    """Prefixes the place (`config.data.id`, a file) to any `UserError` raised inside."""
    try:
        yield
    except UserError as e:
        raise type(e)(f'{where}: {e}') from e
