"""``python -m melt_models.training`` is ``melt-train``."""

import sys

from melt_models.training.cli import main

sys.exit(main())
