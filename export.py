"""Export a checkpoint to a bundle: ``python export.py CHECKPOINT --out BUNDLE``. See ``--help``."""

import sys

from melt_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
