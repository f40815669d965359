"""What is wrong, where, and the nearest that would have been right."""

import pytest

from jaxood.errors import ConfigError, UserError, blame, lookup, unknown


def test_the_nearest_name_and_the_list():
    assert unknown('config.scores.enrgy', 'enrgy', ['msp', 'energy']) == (
        "config.scores.enrgy is not known. Did you mean 'energy'? Known: msp, energy."
    )
    assert unknown('x', 'zzz', ['msp']) == 'x is not known. Known: msp.'
    assert unknown('x', 'zzz', []) == 'x is not known. Known: none.'


def test_lookup():
    table = {'ddim': 1, 'ddpm': 2}
    assert lookup(table, 'ddim', 'sampler') == 1
    with pytest.raises(UserError, match="sampler 'dim' is not known. Did you mean 'ddim'"):
        lookup(table, 'dim', 'sampler')


def test_the_place_is_put_in_front_and_the_kind_is_kept():
    with (
        pytest.raises(ConfigError, match=r'^config\.data: config\.data\.id: no images$'),
        blame('config.data'),
        blame('config.data.id'),
    ):
        raise ConfigError('no images')


def test_defects_are_not_blamed_on_the_user():
    with pytest.raises(ZeroDivisionError, match='^division by zero$'), blame('config.data'):
        _ = 1 / 0
