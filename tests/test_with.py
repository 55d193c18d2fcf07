"""`timm-spa with`: any command, with our models in every Python process of it."""
import os
import signal
import subprocess
import sys
import textwrap
import venv

import pytest

import timm_spa_cli
from timm_spa_cli.with_ import REGISTERED

# as `timm-spa with`, which may not be on PATH; `python -m timm_spa` would import torch
WITH = [sys.executable, '-c', 'from timm_spa_cli import main; raise SystemExit(main())', 'with']
TELL = 'import timm; print(getattr(timm, "registered", None))'


def start(*command, expect=0, **environment):
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=100,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environment})
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def run(*command, **kwargs):
    return start(*WITH, *command, **kwargs)


@pytest.fixture
def script(tmp_path):
    def write(source, name='script.py'):
        (tmp_path / name).write_text(textwrap.dedent(source))
        return tmp_path / name

    return write


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Packages that are imported instead of timm, within milliseconds, and of this one, which asks for all of it."""
    for name, source in (('timm', 'import timm.part\nfinished = True\n'),
                         ('timm_spa', 'import timm\nassert timm.finished\ntimm.registered = "yes"\n')):
        (tmp_path / 'stand_ins' / name).mkdir(parents=True)
        (tmp_path / 'stand_ins' / name / '__init__.py').write_text(source)
    (tmp_path / 'stand_ins' / 'timm' / 'part.py').write_text('import timm\n')
    paths = [str(tmp_path / 'stand_ins'), os.environ.get('PYTHONPATH')]
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, paths)))


def test_the_command_gets_its_arguments(script):
    """Also those that this program has itself, empty ones, and `--`, wherever it stands."""
    path = script('import sys; print(sys.argv[1:])')
    arguments = ['--', 'x', '--traceback', '', '--help', '--', '-h']
    for separator in ([], ['--']):
        assert run(*separator, sys.executable, path, *arguments).stdout == f'{arguments}\n'


@pytest.mark.parametrize('code', [0, 3, 127])
def test_exit_codes(code):
    run(sys.executable, '-c', f'raise SystemExit({code})', expect=code)


def test_the_command_takes_the_place_of_the_process():
    """So signals reach it, and how it ends is how it ended."""
    process = subprocess.Popen(
        [*WITH, sys.executable, '-c', 'import os, signal; print(os.getpid(), flush=True); signal.pause()'],
        stdout=subprocess.PIPE, text=True)
    assert int(process.stdout.readline()) == process.pid
    process.terminate()
    assert process.wait(20) == -signal.SIGTERM
    process.stdout.close()


def test_a_command_that_cannot_be_started(tmp_path, monkeypatch, capsys):
    (tmp_path / 'plain.txt').write_text('no program')
    (tmp_path / 'neighbour').write_text('#!/bin/sh\n')
    (tmp_path / 'neighbour').chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(tmp_path / 'python'))
    for command, code, message in (
            ('no-such-command', 127, "cannot run 'no-such-command': command not found. Check its name"),
            ('', 127, "cannot run '': command not found"),
            (str(tmp_path / 'plain.txt'), 126, 'plain.txt\': Permission denied. Check'),
            ('neighbour', 127, f'Did you mean {tmp_path / "neighbour"}?')):
        assert timm_spa_cli.main(['with', command, 'x']) == code
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.count('\n') == 1


@pytest.mark.parametrize(('argv', 'message'), [
    ([], 'required: COMMAND'), (['--'], 'required: COMMAND'),
    (['--unknown', 'echo'], 'unrecognized arguments: --unknown'),
])
def test_usage(argv, message, capsys):
    with pytest.raises(SystemExit, match='2'):
        timm_spa_cli.main(['with', *argv])
    assert message in capsys.readouterr().err


def test_help_says_what_is_not_reached(capsys):
    with pytest.raises(SystemExit, match='0'):
        timm_spa_cli.main(['with', '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert 'Not reached: Python with -S, -I or -E' in text
    assert 'other machines' in text


@pytest.mark.parametrize('raises', [False, True])
@pytest.mark.parametrize('nested', [[], WITH])
def test_a_hidden_sitecustomize_runs(script, tmp_path, raises, nested):
    """As Python itself would have run it, with Python's own report if it fails, and our hook stays."""
    hidden = script(
        'import sys\nprint("hidden", __name__, __file__)\n' + 'raise ValueError("oh no")\n' * raises,
        'sitecustomize.py')
    code = (
        'import sys; print(getattr(sys.modules.get("sitecustomize"), "__file__", None)); '
        'print(type(sys.meta_path[0]).__name__)')
    environment = dict(PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    alone = start(sys.executable, '-c', code, **environment)
    done = run(*nested, sys.executable, '-c', code, **environment)
    *lines, hook = done.stdout.splitlines()[-3:]  # one process of `timm-spa with` runs it too
    assert lines == [f'hidden sitecustomize {hidden}', 'None' if raises else str(hidden)]
    assert lines == alone.stdout.splitlines()[:2]
    assert hook == '_RegisterAfterTimm'
    assert ('ValueError: oh no' in alone.stderr) == raises
    assert done.stderr == alone.stderr * (3 if nested else 2)


def test_the_environment_is_otherwise_unchanged(script):
    path = script('import os; print(dict(os.environ))')
    before, after = (eval(command(sys.executable, path, LEFT='alone').stdout) for command in (start, run))
    paths = after.pop('PYTHONPATH').split(os.pathsep)
    assert paths == [str(REGISTERED), *filter(None, before.pop('PYTHONPATH', '').split(os.pathsep))]
    assert after == before


@pytest.mark.parametrize('flags', [[], ['-W', 'error']])
def test_registered_once_timm_is_completely_imported(stand_ins, flags):
    """By any import of timm, also if it is asked for first; the hook leaves nothing behind."""
    for statement in ('import timm', 'import timm.part', 'from timm import part; import timm'):
        code = (
            f'import importlib.util, sys; before = list(sys.meta_path); importlib.util.find_spec("timm"); '
            f'print(importlib.util.find_spec("timm").origin, "timm" in sys.modules); {statement}; {TELL}; '
            'print(before[1:] == sys.meta_path, timm.__loader__.exec_module.__qualname__)')
        done = run(sys.executable, *flags, '-c', code)
        first, registered, left = done.stdout.splitlines()
        assert first.endswith('timm/__init__.py False')
        assert registered == 'yes'
        assert left.startswith('True ')
        assert '_RegisterAfterTimm' not in left
        assert done.stderr == ''


def test_a_process_without_timm_does_not_import_it(stand_ins):
    code = 'import sys; print([name for name in sys.modules if name.startswith("timm")])'
    assert run(sys.executable, '-c', code).stdout == '[]\n'


def test_an_import_that_fails_can_be_repeated(stand_ins, tmp_path):
    """Programs do: `try: import timm` at several places."""
    with (tmp_path / 'stand_ins' / 'timm' / '__init__.py').open('a') as f:
        f.write('import sys\nif not hasattr(sys, "again"):\n    sys.again = True\n    raise ImportError("not yet")\n')
    code = f'try:\n    import timm\nexcept ImportError as e:\n    print(e)\n{TELL}'
    assert run(sys.executable, '-c', code).stdout == 'not yet\nyes\n'


@pytest.mark.parametrize(('flag', 'reached'), [('-P', 'yes'), ('-S', 'None'), ('-E', 'None'), ('-I', 'None')])
def test_what_flags_of_python_switch_off(stand_ins, tmp_path, flag, reached):
    """As the help says. The program finds the package by itself here, which has to be imported by itself then, too."""
    if flag == '-P' and sys.version_info < (3, 11):
        pytest.skip('Python 3.10 has no -P')
    code = f'import sys; sys.path.insert(0, {str(tmp_path / "stand_ins")!r}); {TELL}'
    assert run(sys.executable, flag, '-c', code).stdout == f'{reached}\n'


def test_a_python_without_this_package(stand_ins, tmp_path):
    """The program fails where it imports timm, and says which Python needs what."""
    (tmp_path / 'stand_ins' / 'timm_spa' / '__init__.py').unlink()
    (tmp_path / 'stand_ins' / 'timm_spa').rmdir()
    venv.create(tmp_path / 'env')
    python = tmp_path / 'env' / 'bin' / 'python'
    done = start(
        python, '-c', 'import timm', expect=1,
        PYTHONPATH=os.pathsep.join([str(REGISTERED), str(tmp_path / 'stand_ins')]))
    assert f'cannot register the models of timm_spa, because timm_spa is not installed for {python}' in done.stderr


def test_a_python_of_a_virtual_environment(stand_ins, tmp_path):
    venv.create(tmp_path / 'env')
    assert run(tmp_path / 'env' / 'bin' / 'python', '-c', TELL).stdout == 'yes\n'


def test_subprocesses_of_subprocesses(stand_ins):
    code = TELL
    for _ in range(2):
        code = f'{TELL}; import subprocess, sys; subprocess.run([sys.executable, "-u", "-c", {code!r}], check=True)'
    assert run(sys.executable, '-u', '-c', code).stdout == 'yes\n' * 3


@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_processes_of_multiprocessing(stand_ins, script, method):
    path = script(f'''
        import multiprocessing

        def work(queue):
            import timm
            queue.put(timm.registered)

        if __name__ == '__main__':
            context = multiprocessing.get_context({method!r})
            queue = context.Queue()
            process = context.Process(target=work, args=(queue,))
            process.start()
            print(queue.get(timeout=60), process.join())
        ''')
    assert run(sys.executable, path).stdout == 'yes None\n'


def test_torchrun(stand_ins, script):
    path = script(f'''
        import os
        {TELL}
        print('rank', os.environ['RANK'], timm.registered, flush=True)
        ''')
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    lines = run(*launcher, path, '--model', 'x').stdout.splitlines()
    assert sorted(line for line in lines if line.startswith('rank')) == ['rank 0 yes', 'rank 1 yes']


@pytest.mark.slow
def test_timm_itself(script):
    """The models are there, in a new process too, with warnings as errors."""
    path = script('''
        import multiprocessing

        def work():
            import timm
            print(timm.is_model('spa_resnet18'), flush=True)

        if __name__ == '__main__':
            work()
            process = multiprocessing.get_context('spawn').Process(target=work)
            process.start()
            process.join()
        ''')
    done = run(sys.executable, '-W', 'error', path)
    assert done.stdout == 'True\nTrue\n', done.stderr


def test_import_from_inside_timm():
    """timm_spa takes what it needs from where timm defines it: timm itself may have no names yet."""
    code = '''
import sys
from importlib.machinery import PathFinder


class Hook:
    def find_spec(self, name, path=None, target=None):
        if name != 'timm.models':
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            assert not hasattr(sys.modules['timm'], 'create_model')
            import timm_spa

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Hook())
import timm
print(timm.is_model('spa_resnet18'))
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == 'True\n', done.stderr
