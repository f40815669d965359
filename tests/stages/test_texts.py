"""The folder of a generator: told by its contents, wherever it lies, and read once."""

import json
import shutil

import pytest
import spoken

from jaxood.models.stable_diffusion import folder as folders
from jaxood.stages.parts import texts


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(spoken.pipeline(), tmp_path / 'copy')


def test_a_moved_folder_is_the_same_and_a_changed_one_is_not(copied, tmp_path):
    before = texts.digest_of(spoken.pipeline())
    assert texts.digest_of(copied) == before
    moved = copied.rename(tmp_path / 'elsewhere')
    assert texts.digest_of(moved) == before
    scheduler = moved / folders.SCHEDULER
    scheduler.write_text(scheduler.read_text().replace('0.012', '0.013'))
    assert texts.digest_of(moved) != before


def test_converted_weights_count_by_the_hashes_beside_them(copied, tmp_path):
    place = tmp_path / 'ours'
    folders.save(place, copied, folders.parts(copied, 'stable-diffusion'))
    before = texts.digest_of(place)
    (place / 'unet' / folders.WEIGHTS).write_bytes(b'not looked at')
    assert texts.digest_of(place) == before
    facts = json.loads((place / folders.MARK).read_text())
    facts['unet']['sha256'] = '0' * 64
    (place / folders.MARK).write_text(json.dumps(facts))
    assert texts.digest_of(place) != before


def test_it_is_read_once(tmp_path):
    config = spoken.config(tmp_path)
    assert texts.load(config, {}) is texts.load(config, {})
    assert texts.inputs(config) == ()
    assert texts.schedule(config) == texts.load(config, {}).networks.schedule
