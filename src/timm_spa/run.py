"""Entry point of `python -m timm_spa.run SCRIPT`, see `timm_spa.training.runner`."""
import sys

from .training.runner import main

__all__ = ['main']

if __name__ == '__main__':
    sys.exit(main())
