"""Command line, run by `python -m timm_spa`."""
import sys

from timm_spa_cli import main

if __name__ == '__main__':
    sys.exit(main())
