"""The command line: what it accepts, and one message with exit code 2 for what it does not."""

import errno
import os
import pathlib
import runpy
import subprocess
import sys
import time

import ml_collections
import pytest
from absl import flags

from jaxood import main
from jaxood.errors import UserError

QUICKSTART = str(pathlib.Path(__file__).parent.parent / 'configs' / 'quickstart.py')


def forget():
    """Flags outlive a call of `main`, which a process makes only once."""
    for name in list(flags.FLAGS):
        if name.startswith('config.'):
            delattr(flags.FLAGS, name)
        else:
            flags.FLAGS[name].unparse()


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    forget()


@pytest.fixture
def config(tmp_path):
    """A small config file with variants, and what its value of each type is."""
    path = tmp_path / 'small.py'
    path.write_text(
        'import ml_collections\n'
        'from ml_collections import config_dict\n'
        'def get_config(variant="a"):\n'
        '    c = ml_collections.ConfigDict()\n'
        '    c.sampler = dict(name="ddim", steps=50, guidance=2.0)\n'
        '    c.data = dict(path=config_dict.placeholder(str), held_out=(8, 9), flip=False)\n'
        '    c.variant = {"a": 1, "b": 2}[variant]\n'
        '    return c\n'
    )
    return path


@pytest.fixture
def parse(monkeypatch):
    def parse(*argv):
        argv = ['main', '--workdir=w', *argv]
        monkeypatch.setattr(sys, 'argv', argv)  # config_flags looks there
        return main.parse(argv)

    return parse


def test_values_reach_the_config(config, parse):
    c, workdir, stages, joined, estimate = parse(
        *(f'--config={config}:b', '--config.sampler.steps=7', '--config.sampler.guidance=0'),
        *('--config.data.path=here', '--config.data.held_out=(1, 2)', '--config.data.flip=True'),
        '--stages=synthesise,report',
    )
    assert (workdir, stages) == ('w', ['synthesise', 'report'])
    assert (joined, estimate) == ([None, None, None], False)
    assert c.sampler.to_dict() == {'name': 'ddim', 'steps': 7, 'guidance': 0.0}
    assert c.data.to_dict() == {'path': 'here', 'held_out': (1, 2), 'flip': True}
    assert c.variant == 2


def test_values_may_be_words_of_their_own(config, parse):
    c, *_ = parse('--config', str(config), '--config.sampler.steps', '7', '--config.data.flip')
    assert c.sampler.steps == 7
    assert c.data.flip is True


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (
            ['--config.sampler.stepz=5'],
            r"config\.sampler\.stepz is not known.*Did you mean 'steps'",
        ),
        (['--config.sample.steps=5'], r"config\.sample is not known\. Did you mean 'sampler'"),
        (['--config.data.flip', '--config.data.pth=x'], r"config\.data\.pth .*Did you mean 'path'"),
        (['--config.sampler.steps.more=5'], r'config\.sampler\.steps\.more is not known'),
        (['--config.sampler.steps=many'], r'config\.sampler\.steps=many'),
        (['--config.sampler.steps=5.5'], r'config\.sampler\.steps=5\.5'),
        (['--wrkdir=x'], r"--wrkdir is not known\. Did you mean 'workdir'"),
        (['report'], r"'report' is not a flag"),
    ],
)
def test_flags_that_are_refused(config, parse, more, message):
    with pytest.raises(UserError, match=message):
        parse(f'--config={config}', *more)


def test_both_flags_are_needed(config):
    for argv in ([], ['--workdir=w'], [f'--config={config}']):
        with pytest.raises(UserError, match='--config and --workdir are needed'):
            main.parse(['main', *argv])
        forget()


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('def get_config(:\n', r'small\.py, line 1: SyntaxError'),
        ('import nosuchmodule\n', r'small\.py, line 1: ModuleNotFoundError: No module named'),
        ('x = 1\ndef get_config():\n    return y\n', r"small\.py, line 3: NameError: name 'y'"),
        ('config = {}\n', r'small\.py: it has no function get_config'),
        (
            'from jaxood.errors import UserError\ndef get_config():\n    raise UserError("why")\n',
            r'small\.py: why$',
        ),
    ],
)
def test_config_files_that_fail_name_the_line(config, parse, content, message):
    config.write_text(content)
    with pytest.raises(UserError, match=message):
        parse(f'--config={config}')


def test_unknown_files_and_variants(config, parse):
    with pytest.raises(
        UserError, match=r"smal\.py: the file is not known.*Did you mean '.*small\."
    ):
        parse(f'--config={config.parent}/smal.py')
    with pytest.raises(UserError, match=r"small\.py, line 7: KeyError: 'c'"):
        parse(f'--config={config}:c')


def test_the_quickstart_knows_its_variants(parse):
    with pytest.raises(UserError, match="'digit'.*Did you mean 'digits'"):
        parse(f'--config={QUICKSTART}:digit')


# ---- what a person sees -----------------------------------------------------------------------


def one_message(error):
    """Standard error holds one message of jaxood's, and no traceback."""
    return error.startswith('jaxood: ') and error.count('jaxood: ') == 1 and 'Trace' not in error


def test_a_users_error_is_one_message_and_code_2(config, capsys):
    argv = ['main', f'--config={config}', '--workdir=w', '--config.sampler.stepz=5']
    assert main.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    assert one_message(captured.err)
    assert captured.err.count('\n') == 1


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_refuses_is_one_message_and_code_2(number, capsys):
    def execute():
        raise OSError(number, os.strerror(number), '/runs/x')

    assert main.run_command(lambda argv: (), execute, []) == 2
    error = capsys.readouterr().err
    assert one_message(error)
    assert f'{os.strerror(number)}: /runs/x. What was finished is kept' in error


@pytest.mark.parametrize('error', [FileNotFoundError(2, 'gone'), ValueError('x'), KeyError('y')])
def test_a_defect_keeps_its_traceback(error):
    def execute():
        raise error

    with pytest.raises(type(error)):
        main.run_command(lambda argv: (), execute, [])


def test_control_c_says_that_it_goes_on(capsys):
    def execute():
        raise KeyboardInterrupt

    assert main.run_command(lambda argv: (), execute, []) == 130
    assert one_message(capsys.readouterr().err)


def command(*argv, module='jaxood.main'):
    return subprocess.run(
        [sys.executable, '-m', module, *argv], capture_output=True, text=True, timeout=120
    )


def test_the_process_exits_with_2(tmp_path):
    done = command(f'--config={tmp_path}/none.py', '--workdir=w')
    assert done.returncode == 2
    assert one_message(done.stderr)
    done = command(f'--config={QUICKSTART}', f'--workdir={tmp_path}/w', '--config.detector.steps=0')
    assert done.returncode == 2  # found after JAX is imported
    assert one_message(done.stderr)
    assert 'config.detector.steps=0 must be' in done.stderr
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize('module', ['jaxood.main', 'jaxood.predict'])
def test_help_answers_at_once(module):
    """In less than 2 s, an import of JAX alone (two tries: others may keep this machine busy)."""
    for _ in range(2):
        started = time.monotonic()
        done = command('--help', module=module)
        if time.monotonic() - started < 2.0:
            break
    else:
        pytest.fail('--help takes more than 2 s')
    assert done.returncode == 0
    assert '--workdir' in done.stdout
    assert done.stderr == ''


CONFIGS = sorted(pathlib.Path(QUICKSTART).parent.glob('*.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_every_value_of_a_config_can_be_set_on_the_command_line(path):
    """A bare None has no type to read a flag by; `config_dict.placeholder` has."""

    def walk(where, section):
        for key in section:
            if isinstance(section[key], ml_collections.ConfigDict):
                yield from walk(f'{where}.{key}', section[key])
            elif section.get_type(key) is type(None):
                yield f'{where}.{key}'

    for variant in runpy.run_path(str(path))['VARIANTS']:
        assert list(walk('config', main.load_config(f'{path}:{variant}'))) == [], variant
