"""Makes a patch that brings SPA-A into timm's own source, and runs timm's model tests on the patched source.

    python docs/upstream/timm_patch.py               # on timm's newest source distribution; `make timm-patch`
    python docs/upstream/timm_patch.py --no-tests    # only the patch and the text

Writes `build/timm_patch/spa.patch` and `build/timm_patch/pull_request.md`. The layer is this project's file with timm's
imports and without the formulas for compilers and exporters; names, depths and widths are those of this project's
models; the text takes its figures from README, results and speed pages. Fails if timm's source has changed where the
patch goes in, if the patch is longer than 600 lines, if timm's formatter (wruff, set up in timm's pyproject.toml) would
change an added line, or if a test fails.
"""
import argparse
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests'))

import timm  # noqa: E402
import timm_suite  # noqa: E402

import timm_spa  # noqa: E402
from timm_spa.models import efficientnet, resnet  # noqa: E402

HERE = Path(__file__).parent
BUILD = ROOT / 'build' / 'timm_patch'
LAYER = 'timm/layers/spatial_pyramid_attn.py'
RESNETS = [name for name in resnet._BASES if re.fullmatch(r'resnet\d+', name)]
MOBILENETS = [
    name for name in timm_spa.list_models('spa_mobilenetv2*') if re.fullmatch(r'spa_mobilenetv2(_\d+)?', name)]
NAMES = [*(f'spa_{name}' for name in RESNETS), *MOBILENETS]
# timm's models whose blocks the patch touches
NEIGHBOURS = ['seresnet18', 'mobilenetv2_050', 'efficientnet_lite0', 'tf_efficientnet_cc_b0_4e']
LIMIT = 600
PAPER = '`Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576'


class PatchError(Exception):
    """The patch cannot be made of this release of timm."""


class Edit(NamedTuple):
    """An insertion.

    Attributes:
        path: File in timm's source.
        anchor: Text of the file; must be there once, unless `start` is given.
        text: What is inserted behind the anchor.
        start: Text behind which the first anchor is meant.
        is_before: Insert in front of the anchor.
    """
    path: str
    anchor: str
    text: str
    start: str = ''
    is_before: bool = False


def _resnet_entry(base: str) -> str:
    args = resnet._BASES[base]
    block = next(base.__name__ for base in args['block'].__mro__ if base.__module__ == 'timm.models.resnet')
    layers = args['layers']
    return (
        '@register_model\n'
        f'def spa_{base}(pretrained: bool = False, **kwargs) -> ResNet:\n'
        f"    model_args = dict(block={block}, layers={layers}, block_args=dict(attn_layer='spa'))\n"
        f"    return _create_resnet('spa_{base}', pretrained, **dict(model_args, **kwargs))\n\n\n")


def _mobilenet_entry(name: str) -> str:
    width = efficientnet._BASES[name.removeprefix('spa_')].get('width', 1.0)
    return (
        '@register_model\n'
        f'def {name}(pretrained=False, **kwargs) -> EfficientNet:\n'
        f'    """MobileNet V2 w/ {width} channel multiplier, spatial pyramid attention after each projection"""\n'
        "    model_args = dict(attn_layer=partial(get_attn('spa'), rd_ratio=0.125))\n"
        f"    return _gen_mobilenet_v2('{name}', {width}, pretrained=pretrained, **dict(model_args, **kwargs))\n\n\n")


def _test() -> str:
    return '''

@pytest.mark.parametrize('size', [(56, 56), (17, 23)])
def test_spatial_pyramid_attn(size):
    attn = create_attn('spa', 64).eval()
    assert isinstance(attn, SpatialPyramidAttention)
    nn.init.normal_(attn.pyramid_weight)
    x = torch.randn(2, 64, *size)
    levels = [nn.functional.adaptive_avg_pool2d(x, level) for level in (7, 4, 1)]
    pyramid = sum(w * nn.functional.interpolate(level, size=7) for w, level in zip(attn.pyramid_weight, levels))
    gate = torch.sigmoid(attn.fc2(torch.relu(attn.bn(attn.fc1(pyramid)))))
    expected = x * nn.functional.interpolate(gate, size=size)
    torch.testing.assert_close(attn(x), expected)
    torch.testing.assert_close(torch.jit.script(attn)(x), expected)
'''


def edits() -> List[Edit]:
    """Returns the insertions into files that timm has."""
    blocks, builder = 'timm/models/_efficientnet_blocks.py', 'timm/models/_efficientnet_builder.py'
    resnets, effnets = 'timm/models/resnet.py', 'timm/models/efficientnet.py'
    argument = '            attn_layer: Optional[{}] = None,\n'
    se_argument = '            se_layer: Optional[{}] = None,\n'
    made = '        self.attn = attn_layer(out_chs, **dd) if attn_layer else nn.Identity()\n'
    found = [
        Edit('timm/layers/__init__.py', 'from .space_to_depth import SpaceToDepth, DepthToSpace\n',
             'from .spatial_pyramid_attn import SpatialPyramidAttention\n'),
        Edit('timm/layers/create_attn.py', 'from .selective_kernel import SelectiveKernel\n',
             'from .spatial_pyramid_attn import SpatialPyramidAttention\n'),
        Edit('timm/layers/create_attn.py', '                module_cls = StripAttn\n',
             "            elif attn_type == 'spa':\n                module_cls = SpatialPyramidAttention\n"),
        Edit(resnets, '* `Knapsack Pruning with Inner Distillation` - https://arxiv.org/abs/2002.08258\n',
             f'* {PAPER}\n'),
        Edit(resnets, '    #  Squeeze-Excitation ResNets, to eventually replace the models in senet.py\n',
             ''.join(['    # Spatial Pyramid Attention ResNets\n',
                      *(f"    'spa_{name}.untrained': _ttcfg(),\n" for name in RESNETS), '\n']), is_before=True),
        Edit(resnets, '@register_model\ndef seresnet18(', ''.join(map(_resnet_entry, RESNETS)), is_before=True),
        Edit(effnets, 'GroupNormAct, LayerNormAct2d, EvoNorm2dS0,', ' get_attn,'),
        Edit(effnets, '            se_layer: Squeeze-and-excitation layer class.\n',
             '            attn_layer: Attention layer class, after the projection of each IR and DS block.\n'),
        Edit(effnets, "    'fbnetc_100.rmsp_in1k': _cfg(",
             ''.join([*(f"    '{name}.untrained': _cfg(),\n" for name in MOBILENETS), '\n']), is_before=True),
        Edit(effnets, '@register_model\ndef fbnetc_100(', ''.join(map(_mobilenet_entry, MOBILENETS)), is_before=True),
        Edit(builder, se_argument.format('LayerType'), argument.format('LayerType')),
        Edit(builder, '        self.se_layer = get_attn(se_layer)\n',
             '        self.attn_layer = get_attn(attn_layer)\n', is_before=True),
        Edit(builder, "            ba['aa_layer'] = self.aa_layer\n",
             "        if self.attn_layer is not None and bt in ('ir', 'ds', 'dsa'):\n"
             "            ba['attn_layer'] = self.attn_layer\n"),
    ]
    for start in ('class EfficientNet(', 'class EfficientNetFeatures('):
        found += [
            Edit(effnets, se_argument.format('LayerType'), argument.format('LayerType'), start),
            Edit(effnets, '            se_layer=se_layer,\n', '            attn_layer=attn_layer,\n', start)]
    for start, norm in (('class DepthwiseSeparableConv(', 'bn2'), ('class InvertedResidual(', 'bn3')):
        found += [
            Edit(blocks, se_argument.format('ModuleType'), argument.format('ModuleType'), start),
            Edit(blocks, '        self.drop_path =', made, start, is_before=True),
            Edit(blocks, f'        x = self.{norm}(x)\n', '        x = self.attn(x)\n', start)]
    found += [
        Edit('tests/test_layers.py', '    RotAttentionPool2d,\n', '    SpatialPyramidAttention,\n'),
        Edit('tests/test_layers.py', '    create_act_layer,\n', '    create_attn,\n'),
        Edit('README.md', '    * Squeeze-and-Excitation Networks (SEResNet) - https://arxiv.org/abs/1709.01507\n',
             '    * Spatial Pyramid Attention (SPANet) - https://doi.org/10.1109/TMM.2021.3068576\n'),
    ]
    return found


def layer_file() -> str:
    """Returns this project's layer with the imports and the example that it would have in timm.

    Raises:
        PatchError: The layer's file has changed where it names timm.
    """
    text = (ROOT / 'src' / 'timm_spa' / 'layers' / 'spatial_pyramid_attn.py').read_text(encoding='utf-8')
    for here, there in (
            ('from timm.layers import LayerType, create_act_layer, get_norm_layer\n\n'
             'from .pyramid_formulas import gate_formula, pyramid_formula\n'
             'from .torchscript import is_scripting, is_tracing\n',
             '\nfrom .create_act import create_act_layer\nfrom .create_norm import get_norm_layer\n'
             'from .typing import LayerType\n'),
            ('block_args=dict(attn_layer=timm_spa.SpatialPyramidAttention)', "block_args=dict(attn_layer='spa')"),
            ('if not is_tracing()', 'if not torch.jit.is_tracing()'),
            # timm gets the equations alone
            ('    if not is_scripting():\n        formula = pyramid_formula(x)\n        if formula is not None:\n'
             '            return formula(x, sizes, weight)\n', ''),
            ('    if not is_scripting():\n        formula = gate_formula(x)\n        if formula is not None:\n'
             '            return formula(x, gate, shortcut)\n', ''),
    ):
        if text.count(here) != 1:
            raise PatchError(f'spatial_pyramid_attn.py has {text.count(here)} times {here!r}, must have it once.')
        text = text.replace(here, there)
    return text


def patched_files(read: Callable[[str], str]) -> Dict[str, str]:
    """Returns the new text of each file of timm that the patch changes or adds.

    Args:
        read: Returns the text of a file of timm's source.

    Raises:
        PatchError: The text that an insertion goes by is not there.
    """
    files: Dict[str, str] = {}
    for edit in edits():
        text = files.get(edit.path) or read(edit.path)
        if text.count(edit.start) != 1 and edit.start:
            raise PatchError(f'{edit.path} has {text.count(edit.start)} times {edit.start!r}, must have it once.')
        head, middle, rest = text.partition(edit.start) if edit.start else ('', '', text)
        if edit.anchor not in rest or not edit.start and text.count(edit.anchor) > 1:
            raise PatchError(f'{edit.path} has {rest.count(edit.anchor)} times {edit.anchor!r}, must have it once.')
        before, anchor, after = rest.partition(edit.anchor)
        new = edit.text + anchor if edit.is_before else anchor + edit.text
        files[edit.path] = head + middle + before + new + after
    files['tests/test_layers.py'] = files['tests/test_layers.py'].rstrip('\n') + '\n' + _test()
    files[LAYER] = layer_file()
    files['hfdocs/source/models/spa-resnet.mdx'] = (HERE / 'spa-resnet.mdx').read_text(encoding='utf-8')
    return files


def formatted(text: str, path: str, source: Path) -> str:
    """Returns a Python file as timm's formatter would write it.

    Raises:
        PatchError: The formatter is not installed, or fails.
    """
    command = shutil.which('wruff', path=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))
    if command is None:
        raise PatchError("timm's formatter is missing: pip install wruff")
    done = subprocess.run(
        [command, 'format', '--config', str(source / 'pyproject.toml'), '--stdin-filename', path, '-'],
        input=text, capture_output=True, encoding='utf-8')
    if done.returncode:
        raise PatchError(f'{path}: wruff says {done.stderr.strip()}')
    return done.stdout


def misformatted(old: str, new: str, after: str) -> List[str]:
    """Returns the added lines that a formatter changes; a change that also takes in lines of timm is timm's own.

    Args:
        old: The file before the patch.
        new: The file with the patch.
        after: The file with the patch, formatted.
    """
    lines = new.splitlines()
    insertions = difflib.SequenceMatcher(None, old.splitlines(), lines, autojunk=False).get_opcodes()
    added = {i for kind, _, _, start, end in insertions if kind != 'equal' for i in range(start, end)}
    changes = difflib.SequenceMatcher(None, lines, after.splitlines(), autojunk=False).get_opcodes()
    hunks = [range(start, end) for kind, start, end, _, _ in changes if kind != 'equal' and start < end]
    return [lines[i] for hunk in hunks if added.issuperset(hunk) for i in hunk if lines[i]]


def diff(path: str, old: str, new: str) -> str:
    """Returns the part of the patch that changes a file, or adds it if `old` is empty."""
    head = f'diff --git a/{path} b/{path}\n' + ('' if old else 'new file mode 100644\n')
    return head + ''.join(difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), f'a/{path}' if old else '/dev/null', f'b/{path}'))


def table(page: str, header: str) -> str:
    """Returns the table of a page of this project whose first line starts with `header`.

    Raises:
        PatchError: The page has no such table.
    """
    lines = (ROOT / page).read_text(encoding='utf-8').splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(header)), None)
    if start is None:
        raise PatchError(f'{page} has no table that starts with {header!r}.')
    rows = lines[start:]
    end = next((i for i, line in enumerate(rows) if not line.startswith('|')), len(rows))
    return '\n'.join(re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', row) for row in rows[:end])


def pull_request() -> str:
    """Returns the text of the pull request, its figures taken from this project's pages."""
    costs = json.loads((ROOT / 'src' / 'timm_spa' / 'models.json').read_text(encoding='utf-8'))['models']
    size = '\n'.join(
        f"| `{name}` | {costs[name]['parameters']:,} | {costs[name]['macs'] / 1e9:.2f} |" for name in NAMES)
    return (HERE / 'pull_request.md').read_text(encoding='utf-8').format(
        accuracy=table('README.md', '| top-1 (%) | plain | SE | SPA |'),
        runs=table('train_scripts/results/README.md', '| data | model | attention |'),
        cpu=table('README.md', '| ResNet-50 at 224 pixels, relative to'),
        gpu=table('tests/benchmarks/speed.md', '| | img/s | ratio |'),
        size=size,
    )


def run_layer_tests(tree: Path) -> int:
    """Runs timm's tests of its layers in the patched source, and returns their exit code."""
    return subprocess.run(
        [sys.executable, '-m', 'pytest', 'tests/test_layers.py', '-q', '-p', 'no:cacheprovider', '-W', 'ignore'],
        cwd=tree, env=dict(os.environ, PYTHONPATH=str(tree))).returncode


def run_model_tests(tree: Path, jobs: int) -> ET.Element:
    """Runs timm's tests of models in the patched source, and returns their report."""
    cache = BUILD / 'hub'
    timm_suite.fill_cache(NEIGHBOURS, cache)  # the new models have no weights
    tags = [*(f'{name}.untrained' for name in NAMES), *map(timm_suite.default_tag, NEIGHBOURS)]
    return timm_suite.run_tests(
        [*NAMES, *NEIGHBOURS, *tags], tree, jobs, PYTHONPATH=str(tree), HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(cache))


def main() -> int:
    """Runs the command line, and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--no-tests', action='store_true', help='make the patch and the text only')
    parser.add_argument('--jobs', type=int, default=os.cpu_count() or 1, help='processes (default: one a core)')
    args = parser.parse_args()

    source = timm_suite.timm_source()
    tree = BUILD / source.name
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.copytree(source, tree)
    try:
        files = patched_files(lambda path: (source / path).read_text(encoding='utf-8'))
        files[LAYER] = formatted(files[LAYER], LAYER, source)
        problems, parts = [], []
        for path, new in sorted(files.items()):
            old = (source / path).read_text(encoding='utf-8') if (source / path).exists() else ''
            if path.endswith('.py'):
                problems += [f'{path}: timm formats otherwise: {line.strip()}'
                             for line in misformatted(old, new, formatted(new, path, source))]
            parts.append(diff(path, old, new))
        text = pull_request()
    except PatchError as e:
        print(f'{source.name}: {e}', file=sys.stderr)
        return 1
    patch = ''.join(parts)
    (BUILD / 'spa.patch').write_text(patch, encoding='utf-8')
    (BUILD / 'pull_request.md').write_text(text, encoding='utf-8')
    # as a maintainer would, so that what is tested is the patch
    subprocess.run(['git', 'apply', '--whitespace=error', str(BUILD / 'spa.patch')], cwd=tree, check=True,
                   env=dict(os.environ, GIT_CEILING_DIRECTORIES=str(BUILD)))
    count = patch.count('\n')
    if count >= LIMIT:
        problems.append(f'{count} lines, more than {LIMIT}')
    print(f'{BUILD / "spa.patch"}: {count} lines in {len(files)} files of {source.name}')
    if not args.no_tests:
        if run_layer_tests(tree):
            problems.append("timm's tests of its layers fail")
        report = run_model_tests(tree, args.jobs)
        tags = [tag for tag in map(timm_suite.default_tag, NEIGHBOURS) if tag in timm.list_pretrained()]
        problems += timm_suite.problems_of(report, [*NAMES, *NEIGHBOURS], tags)
        print(f"timm's own tests on {len(NAMES)} new models and {len(NEIGHBOURS)} of timm: "
              f'{sum(1 for _ in report.iter("testcase"))} run')
    print('\n'.join(problems) or 'no problems')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
