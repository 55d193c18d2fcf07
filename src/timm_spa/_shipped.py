"""Files of the package: recipes and launch configurations of accelerate."""
from pathlib import Path
from typing import Dict

from ._errors import UsageError
from ._names import did_you_mean

__all__ = ['find_recipe', 'shipped_files']


def shipped_files() -> Dict[str, Path]:
    """Returns the paths of recipes by NAME, and of launch configurations by 'accelerate/NAME'."""
    package = Path(__file__).parent
    root = package if (package / 'recipes').is_dir() else package.parents[1] / 'train_scripts'
    files = {path.stem: path for path in sorted((root / 'recipes').glob('*.yaml'))}
    files.update({f'accelerate/{path.stem}': path for path in sorted((root / 'accelerate').glob('*.*'))})
    return files


def find_recipe(name: str) -> Path:
    """Returns the path of a recipe or launch configuration, by its name in `shipped_files`."""
    files = shipped_files()
    if name not in files:
        raise UsageError(f'Unknown recipe {name!r}.{did_you_mean(name, files, 1)} Available: {", ".join(files)}.')
    return files[name]
