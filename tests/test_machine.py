"""What is said of the machine agrees with what the system says elsewhere."""

import os
import pathlib

import jax
import numpy as np

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


def test_the_peak_holds_what_was_held():
    before = machine.peak()
    held = np.ones(2**26, np.uint8)
    assert before == 0 or machine.peak() >= held.nbytes


def test_versions_are_those_installed():
    found = machine.versions(('jax', 'no-such-package'))
    assert found == {'jax': jax.__version__}
    facts = machine.facts()
    assert facts['versions']['jax'] == jax.__version__
    assert len(facts['devices']) == jax.device_count()
    assert 1 <= facts['cores'] <= os.cpu_count()
