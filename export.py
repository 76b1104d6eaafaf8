"""Export a checkpoint to a bundle: ``python export.py CHECKPOINT --out BUNDLE``. See ``--help``."""

import sys

try:
    from melt_export.cli import main
except ImportError as error:
    sys.exit(f"error: {error}: pip install '.[cpu,export]', or make setup and .venv/bin/python export.py")

if __name__ == "__main__":
    sys.exit(main())
