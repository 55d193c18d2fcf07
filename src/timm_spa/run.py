"""`python -m timm_spa.run SCRIPT`: runs timm's own scripts with our models, see `timm_spa.training.runner`."""
import sys

from .training.runner import main

__all__ = ['main']

if __name__ == '__main__':
    sys.exit(main())
