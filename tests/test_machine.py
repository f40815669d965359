"""What is said of the machine agrees with what the system says elsewhere."""

import os
import pathlib
import subprocess
import sys

import jax

from jaxood import machine


def test_memory_is_what_the_system_says(monkeypatch):
    every, free = machine.memory()
    if every is not None:
        assert every == os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        assert 0 < free <= every

    def unreadable(self):
        raise OSError

    monkeypatch.setattr(pathlib.Path, 'read_text', unreadable)
    assert machine.memory() == (None, None)
    assert machine.peak() == 0
    assert machine.processor()


HOLDS = """
from jaxood import machine
before = machine.peak()
held = bytearray(2**27)
print(machine.peak() - before)
"""


def test_the_peak_holds_what_was_held():
    if machine.peak() == 0:
        return  # the system does not say
    # a process of its own: this one has held more already
    said = subprocess.run([sys.executable, '-c', HOLDS], capture_output=True, text=True, check=True)
    assert 2**27 - 2**20 <= int(said.stdout) < 2**28


def test_versions_are_those_installed():
    found = machine.versions(('jax', 'no-such-package'))
    assert found == {'jax': jax.__version__}
    facts = machine.facts()
    assert facts['versions']['jax'] == jax.__version__
    assert len(facts['devices']) == jax.device_count()
    assert 1 <= facts['cores'] <= os.cpu_count()
