"""Runs timm's own scripts with the models of this package registered.

    python -m timm_spa.run train --model spa_resnet50 ...
    accelerate launch [accelerate's options] -m timm_spa.run train --model spa_resnet50 ...

timm's release on the package index does not contain its scripts. They are read from `--timm-scripts PATH` or the
environment variable TIMM_SCRIPTS: a checkout of pytorch-image-models, or one script. By default, the scripts of the tag
that this package is tested with are downloaded once, and their digests are checked before they run.
`--timm-scripts v1.0.31` uses another tag: its first download records the digest, later ones are compared with it.
"""
import hashlib
import http.client
import os
import re
import runpy
import sys
import urllib.request
from pathlib import Path
from typing import List, Optional, Tuple

from .._errors import TimmSpaError, UsageError
from .._shipped import find_recipe
from ..checkpoints.files import replacing
from ..checkpoints.hub_files import HubWeightsError
from .arguments import cause_of
from .guard import TrainingError
from .script_guard import guarded_script

__all__ = ['find_script', 'main']

SCRIPTS_TAG = 'v1.0.28'
SCRIPTS_URL = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models/{tag}/{name}.py'
SHA256 = {
    'avg_checkpoints': '97b7e3240dab64cabeef658ee468ab80bd246e5a268944b372f4cb1b90c27b50',
    'benchmark': 'c2257b70ef9cd6e1dbc19a86cc5d0daea0505649a82352add58013d0382ed1ba',
    'clean_checkpoint': '9e8765c82ff3926d7fdac1727b936f58e645e2acd743bdcb42f56cbfe1faec14',
    'inference': 'fc36c81ae3372b60fb7dc3a2b8676fd3de84afb79152134073109ac0333c95d4',
    'onnx_export': 'f685366d0f814c3764445b3d2edb2966f0e3194b19511a280d9e3cbb72c82418',
    'onnx_validate': 'e4e631022e3720ecfac175ab5db5ee3d6eed25495c4f37f9b9c2499103fc5405',
    'train': '1fb02d26fe16536bc7de2c987980644353117c2b2b8046532261464093cd1ac6',
    'validate': '1ff87867c808997ce443eb8ff8b2c7324519cdd0ec9dafbc3d5e666f89436749',
}
DOWNLOAD_TIMEOUT = 20  # seconds


_USAGE = f"""usage: python -m timm_spa.run SCRIPT [--timm-scripts PATH] [arguments of timm's script]

SCRIPT is one of {', '.join(SHA256)}.
--timm-scripts PATH  a checkout of pytorch-image-models, one of its scripts, or a tag such as v1.0.31 (default: the
                     environment variable TIMM_SCRIPTS, else {SCRIPTS_TAG}, downloaded once and checked)
--config recipe:NAME a recipe of timm_spa; `timm-spa recipes` lists them
"""


def find_script(name: str, given: Optional[str] = None) -> Path:
    """Finds one of timm's scripts, and downloads it if needed.

    Args:
        name: Name of the script without its suffix, a key of `SHA256`.
        given: A checkout of pytorch-image-models or one of its scripts, used unchecked; or a tag. If None, the
            environment variable TIMM_SCRIPTS, else `SCRIPTS_TAG`.

    Returns:
        Path of the script.

    Raises:
        UsageError: The name is unknown, or the given path does not contain the script.
        TrainingError: The script cannot be downloaded or stored, or has an unexpected digest. The cache is unchanged.
    """
    if name not in SHA256:
        raise UsageError(f'Unknown script {name!r}. Choose one of {", ".join(SHA256)}.')
    given = given or os.environ.get('TIMM_SCRIPTS') or SCRIPTS_TAG
    path = Path(given)
    if path.exists() or not re.fullmatch(r'v\d+\.\d+\.\w+', given):
        script = path / f'{name}.py' if path.is_dir() else path
        if script.name != f'{name}.py' or not script.is_file():
            raise UsageError(
                f'{name}.py not found: {given} (from --timm-scripts or TIMM_SCRIPTS) is neither this file nor a folder '
                f'with it. Give a checkout of pytorch-image-models, or a tag such as {SCRIPTS_TAG}.')
        return script
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    script = cache / 'timm_spa' / 'scripts' / given / f'{name}.py'
    record = script.with_suffix('.sha256')
    expected = SHA256[name] if given == SCRIPTS_TAG else _recorded(record)
    if script.is_file() and _sha256(script.read_bytes()) == expected:
        return script
    data = _download(name, given, expected)
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        with replacing(script) as partial:  # the processes of a launch may all download at the same time
            partial.write_bytes(data)
        if expected is None:
            with replacing(record) as partial:
                partial.write_text(f'{_sha256(data)}\n')
            print(f'{script}: recorded SHA-256 {_sha256(data)} for later downloads.', file=sys.stderr)
    except OSError as e:
        raise TrainingError(
            f'{name}.py cannot be stored in the cache: {cause_of(e)}. Set XDG_CACHE_HOME to a writable folder, or give '
            f'the path of {name}.py with --timm-scripts.') from e
    return script


def _recorded(record: Path) -> Optional[str]:
    """Returns the digest in a file, None if the file is missing or damaged."""
    text = record.read_text(errors='replace').strip() if record.is_file() else ''
    return text if re.fullmatch('[0-9a-f]{64}', text) else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _download(name: str, tag: str, expected: Optional[str]) -> bytes:
    # torch.hub.download_url_to_file has no timeout
    url = SCRIPTS_URL.format(tag=tag, name=name)
    remedy = (
        f'Download {name}.py of timm {tag} another way, and give its path (or a checkout of pytorch-image-models) with '
        '--timm-scripts or TIMM_SCRIPTS.')
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
            data = response.read()
    except (http.client.HTTPException, OSError) as e:
        raise TrainingError(f'Could not download {url}: {cause_of(e)}. {remedy}') from e
    if expected and _sha256(data) != expected:
        raise TrainingError(
            f'{url} was downloaded but not stored: its SHA-256 is {_sha256(data)}, expected {expected}. {remedy}')
    return data


def _split_args(args: List[str]) -> Tuple[Optional[str], List[str]]:
    """Separates --timm-scripts from the arguments of timm's script, and replaces `recipe:NAME` by the recipe's path."""
    given = None
    rest = []
    remaining = iter(args)
    for arg in remaining:
        if arg == '--timm-scripts':
            given = next(remaining, None)
            if given is None:
                raise UsageError('--timm-scripts needs a path or a tag.')
        elif arg.startswith('--timm-scripts='):
            given = arg.partition('=')[2]
        else:
            option, separator, name = arg.rpartition('recipe:')
            rest.append(f'{option}{find_recipe(name)}' if separator and option in ('', '--config=') else arg)
    return given, rest


def main(argv: Optional[List[str]] = None) -> int:
    """Runs one of timm's scripts in this process.

    Returns:
        0 on success, 1 if the script cannot continue (see `script_guard`), 2 if the script cannot be found or
        downloaded. Other errors of the script, including `SystemExit`, are passed on.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help'):
        print(_USAGE, end='', file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    try:
        given, rest = _split_args(argv[1:])
        script = find_script(argv[0], given)
    except TimmSpaError as e:
        print(f'timm_spa.run: {e}', file=sys.stderr)
        return 2
    sys.argv = [str(script), *rest]
    try:
        with guarded_script(argv[0]):
            runpy.run_path(str(script), run_name='__main__')
    except TimmSpaError as e:
        option = dict(train='--pretrained-path', validate='--checkpoint', inference='--checkpoint').get(argv[0])
        hint = f' With {argv[0]}.py, use {option} FILE.' if option and isinstance(e, HubWeightsError) else ''
        print(f'timm_spa.run: {e}{hint}', file=sys.stderr)
        return 1
    except ModuleNotFoundError as e:
        print(
            f'timm_spa.run: {script.name} needs the package {e.name!r}, which is not installed. Install it with pip.',
            file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
