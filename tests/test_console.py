"""One line for a human, one for a program."""

import io
import json

import pytest

from jaxood import console


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests turn by hand: `clock[0]` seconds."""
    now = [0.0]
    monkeypatch.setattr(console.time, 'monotonic', lambda: now[0])
    return now


def test_a_terminal_sees_one_line_that_changes(clock):
    stream = Terminal()
    progress = console.Progress('train', 100, stream=stream)
    for done in (10, 20):
        clock[0] += 5.0
        progress.update(done, loss=0.25, **{'images/s': 120})
    progress.close(loss=0.125)
    lines = stream.getvalue().split('\r\033[K')[1:]
    assert [line.split() for line in lines] == [
        ['train', '10/100', 'loss', '0.25', 'images/s', '120', '0:45', 'left'],
        ['train', '20/100', 'loss', '0.25', 'images/s', '120', '0:40', 'left'],
        ['train', '20/100', 'loss', '0.125', 'in', '0:10'],
    ]
    assert stream.getvalue().count('\n') == 1


def test_a_file_gets_a_line_every_ten_seconds(clock):
    stream = io.StringIO()
    progress = console.Progress('train', 100, stream=stream)
    for done in range(1, 26):
        clock[0] += 1.0
        progress.update(done)
    progress.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
        *('10/100', '20/100', '25/100')
    ]
    assert '\033' not in stream.getvalue()


def test_time_left_counts_from_the_restart(clock):
    """At step 50 of 100, five of which took 10 s here: 90 s are left, not 10."""
    progress = console.Progress('train', 100, start=50, stream=Terminal())
    clock[0] = 10.0
    progress.update(55)
    assert '1:30 left' in progress.line


def test_steps_logged_again_after_a_kill_count_once(tmp_path):
    path = tmp_path / 'folder' / 'log.jsonl'
    log = console.Log(path)
    for row in ({'step': 2, 'loss': 9.0}, {'step': 4, 'loss': 8.0}):
        log.write(row)
    with open(path, 'a') as f:
        f.write('{"step": 6, "lo\n')  # the kill
    for row in ({'step': 4, 'loss': 8.5}, {'step': 6, 'loss': 7.0}):
        console.Log(path).write(row)
    assert [json.loads(line)['step'] for line in path.read_text().splitlines()[:2]] == [2, 4]
    assert console.read_log(path) == [
        *({'step': 2, 'loss': 9.0}, {'step': 4, 'loss': 8.5}, {'step': 6, 'loss': 7.0})
    ]


def test_no_log_has_no_rows(tmp_path):
    assert console.read_log(tmp_path / 'log.jsonl') == []


def test_compilation_is_not_held_against_the_time_left(clock):
    """60 s until the first of 101 steps was done, then 1 s each: after ten more, 90 s are left."""
    progress = console.Progress('train', 101, stream=Terminal())
    clock[0] = 60.0
    progress.compiled(1)
    clock[0] = 70.0
    progress.update(11)
    assert '1:30 left' in progress.line
