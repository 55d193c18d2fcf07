"""Releases of timm and torch: lowest versions, private names, warnings."""
import ast
import importlib
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm

from timm_spa import _timm_release

ROOT = Path(__file__).parent.parent
DEPENDENCIES = ('accelerate', 'huggingface_hub', 'safetensors', 'timm', 'torch', 'torchvision')
# Private names that the package uses, and the releases in which each was tested. timm and torch have no public API for
# subclassing these blocks, reading weights from a folder, writing only config.json, or counting recompilations.
PRIVATE = {
    ('timm.models._efficientnet_blocks', 'ConvBnAct'): 'timm 1.0.31',
    ('timm.models._efficientnet_blocks', 'DepthwiseSeparableConv'): 'timm 1.0.31',
    ('timm.models._efficientnet_blocks', 'InvertedResidual'): 'timm 1.0.31',
    ('timm.models._efficientnet_builder', 'decode_arch_def'): 'timm 1.0.31',
    ('timm.models._efficientnet_builder', 'efficientnet_init_weights'): 'timm 1.0.31',
    ('timm.models._efficientnet_builder', 'resolve_bn_args'): 'timm 1.0.31',
    ('timm.models._efficientnet_builder', 'round_channels'): 'timm 1.0.31',
    ('timm.models._features', 'FeatureGetterNet'): 'timm 1.0.31',
    ('timm.models._hub', 'load_state_dict_from_path'): 'timm 1.0.31',
    ('timm.models._hub', 'save_config_for_hf'): 'timm 1.0.31',
    ('timm.models._input', 'get_model_args'): 'timm 1.0.31',
    ('timm.models._input', 'update_model_args'): 'timm 1.0.31',
    ('torch._dynamo', 'config'): 'torch 2.6 and 2.14; the option that is set has a fallback',
    ('torch._dynamo', 'utils.counters'): 'torch 2.6 and 2.14',
    ('torch._inductor', 'aoti_compile_and_package'): 'torch 2.6 and 2.14; documented, in spite of its name',
    ('torch._inductor', 'aoti_load_package'): 'torch 2.6 and 2.14; documented, in spite of its name',
}


def private_names(tree):
    """Yields the private modules and names of other packages that a file uses."""
    def is_private(dotted):
        return dotted.partition('.')[0] in DEPENDENCIES and re.search(r'\._[a-z]', dotted)

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, a.name) for a in node.names if is_private(f'{node.module}.{a.name}'))
        elif isinstance(node, ast.Import):
            yield from ((alias.name, '') for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if re.fullmatch(r'[\w.]+', dotted) and is_private(dotted):
                package, module, *rest = dotted.split('.')
                yield f'{package}.{module}', '.'.join(rest)


def test_all_private_names_are_listed():
    used = set()
    for path in [*(ROOT / 'src').rglob('*.py'), *(ROOT / 'train_scripts').rglob('*.py')]:
        used |= set(private_names(ast.parse(path.read_text(encoding='utf-8'))))
    # for 'torch._dynamo.config.x' the walk also yields 'torch._dynamo' and 'torch._dynamo.config'
    longest = {(m, n) for m, n in used if n and not any(m == o and p.startswith(f'{n}.') for o, p in used)}
    assert longest == set(PRIVATE)


@pytest.mark.parametrize(('module', 'name'), PRIVATE, ids='.'.join)
def test_private_names_exist(module, name):
    value = importlib.import_module(module)
    for part in name.split('.'):
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(f'{module}.{part}')
            except ImportError:
                package = module.partition('.')[0]
                pytest.fail(
                    f'{module}.{name} not found in {package} {metadata.version(package)}, '
                    f'last tested with {PRIVATE[module, name]}')


def run_with_timm(tmp_path, version, program):
    """Runs a program with an empty timm package of the given version."""
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text(f'__version__ = {version!r}\n')
    paths = [str(tmp_path), str(ROOT / 'src')]
    return subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths)))


@pytest.mark.parametrize('version', ['0.9.16', '1.0.9', '1.0.30'])
def test_old_timm_raises_an_error_of_one_line(tmp_path, version):
    done = run_with_timm(tmp_path, version, 'import timm, timm_spa')
    assert done.stderr.splitlines()[-1] == (
        'timm_spa._timm_release.TimmTooOldError: timm_spa requires timm 1.0.31 or newer, but '
        f'{version} is installed: pip install --upgrade timm')


@pytest.mark.parametrize('version', ['1.0.31', '1.0.32.dev0', '1.1'])
def test_newer_timm_is_accepted(monkeypatch, version):
    monkeypatch.setattr(timm, '__version__', version)
    importlib.reload(_timm_release)


def test_command_line_prints_one_line_for_an_old_timm(tmp_path):
    done = run_with_timm(tmp_path, '1.0.20', 'import timm_spa_cli; raise SystemExit(timm_spa_cli.main(["recipes"]))')
    assert done.returncode == 1
    assert done.stderr == (
        'timm-spa: timm_spa requires timm 1.0.31 or newer, but 1.0.20 is installed: pip install --upgrade timm\n')


def test_oldest_timm_is_the_bound_in_pyproject():
    assert f'"timm>={_timm_release.OLDEST},<2"' in (ROOT / 'pyproject.toml').read_text(encoding='utf-8')


def test_importing_timm_does_not_load_this_package():
    """The command is the only entry point, so a bug in this package cannot break `import timm`."""
    assert {entry.group for entry in metadata.distribution('timm_spa').entry_points} == {'console_scripts'}


def test_package_raises_no_warnings():
    """Includes deprecation warnings of dependencies, e.g. of torch.jit or an HTTP library."""
    program = (
        'import timm, torch, warnings\n'
        'for kind in (DeprecationWarning, FutureWarning, UserWarning):\n'
        '    warnings.simplefilter("error", kind)\n'
        'import timm_spa\n'
        'model = timm.create_model("spa_mobilenetv2_050").eval()\n'
        'model(torch.randn(1, 3, 32, 32)).sum().backward()\n'
        'with torch.inference_mode():\n'
        '    timm.utils.reparameterize_model(model)(torch.randn(1, 3, 32, 32))\n')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_torch_without_torchscript():
    """timm's models and torch.compiler need TorchScript themselves, so this tests the import."""
    program = (
        'import timm, torch\n'
        'del torch.jit\n'
        'import timm_spa\n'
        'print(timm_spa.SpatialPyramidAttention(8).fc1.weight.shape)\n')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, 'torch.Size([1, 8, 1, 1])'), done.stderr


def test_torchscript_is_used_in_one_file():
    code = re.compile(r'(?<!`)torch\.jit\b')
    assert [p.name for p in (ROOT / 'src').rglob('*.py') if code.search(p.read_text(encoding='utf-8'))] == []
