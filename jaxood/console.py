"""What a run says: one line that a human reads, and one JSON line that a program reads."""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

_muted = False  # where another host says it all
QUIET_SECONDS = 10.0  # between progress lines where the terminal cannot overwrite the last one


class Progress:
    """One line for a stage: what, step of steps, loss, images/s, time left.

    On a terminal the line is rewritten in place; in a file or a pipe a new one comes every ten
    seconds. `close` leaves the last state standing.
    """

    def __init__(self, what: str, total: int, *, start: int = 0, stream=None):
        self.what, self.total, self.done, self.first = what, total, start, start
        self.stream = stream or sys.stderr
        self.live, self.line = self.stream.isatty(), ''
        self.began = self.started = self.shown = time.monotonic()
        if self.live:
            self._print(f'{what:<32} compiling', end='')

    def compiled(self, done: int) -> None:
        """What took time up to here was compilation: the time left is judged by what follows."""
        self.first, self.started = done, time.monotonic()

    def update(self, done: int, **facts: float | str) -> None:
        """Shows progress; `facts` follow as `name value`, floats with four digits."""
        now = time.monotonic()
        self.done = done
        left = (now - self.started) / max(done - self.first, 1) * (self.total - done)
        self.line = f'{self.what:<32} {done}/{self.total} {_shown(facts)} {_clock(left)} left'
        if self.live:
            self._print(f'\r\033[K{self.line[:140]}', end='')
        elif now - self.shown >= QUIET_SECONDS:
            self.shown = now
            self._print(self.line)

    def close(self, **facts: float | str) -> None:
        """Ends the line with how long it took, compilation and all."""
        start = '\r\033[K' if self.live else ''
        took = _clock(time.monotonic() - self.began)
        line = f'{self.what:<32} {self.done}/{self.total} {_shown(facts)} in {took}'
        self._print(f'{start}{line}')

    def _print(self, text, end='\n'):
        if not _muted:
            print(text, end=end, file=self.stream, flush=True)


def say(text: str) -> None:
    """A plain line for the human, on standard error like the progress."""
    if not _muted:
        print(text, file=sys.stderr, flush=True)


def mute() -> None:
    """Says and logs nothing from now on in this process: of several hosts, one does."""
    global _muted
    _muted = True


class Log:
    """Appends JSON lines to a file: `{"step": 100, "loss": 0.51, ...}`."""

    def __init__(self, path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: Mapping[str, Any]) -> None:
        if _muted:
            return
        line = json.dumps(dict(row)) + '\n'
        if '://' in str(self.path):  # objects cannot be appended to: the whole is put anew
            old = self.path.read_text() if self.path.exists() else ''
            self.path.write_text(old + line)
            return
        with open(self.path, 'a') as f:
            f.write(line)


def read_log(path) -> list[dict[str, Any]]:
    """The rows of a log.

    A step logged again after a restart counts once; a line cut short by a kill is left out.
    """
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row['step']] = row
    return [rows[step] for step in sorted(rows)]


def _shown(facts) -> str:
    return ' '.join(
        f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in facts.items()
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f'{minutes}:{seconds:02d}'
