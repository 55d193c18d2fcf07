"""What comes with the package: photographs, and recipes and launch configurations of train_scripts."""
from pathlib import Path
from typing import Dict, List

from ._errors import UsageError
from ._names import did_you_mean

__all__ = ['find_recipe', 'shipped_files', 'shipped_photographs']


def shipped_files() -> Dict[str, Path]:
    """Returns recipes by name, and launch configurations as 'accelerate/NAME'."""
    package = Path(__file__).parent
    root = package if (package / 'recipes').is_dir() else package.parents[1] / 'train_scripts'
    files = {path.stem: path for path in sorted((root / 'recipes').glob('*.yaml'))}
    files.update({f'accelerate/{path.stem}': path for path in sorted((root / 'accelerate').glob('*.*'))})
    return files


def shipped_photographs() -> List[Path]:
    """Returns the test photographs of the demo, named after their classes, in the order of their names."""
    return sorted((Path(__file__).parent / 'images').glob('*.jpg'))


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe or launch configuration, by its name in `shipped_files`."""
    files = shipped_files()
    if name not in files:
        raise UsageError(f'There is no recipe {name!r}.{did_you_mean(name, files, 1)} There are: {", ".join(files)}.')
    return files[name]
