"""``python -m melt_runtime``: the command ``melt``, where its script is not on the path."""

import sys

from melt_runtime.cli.main import main

sys.exit(main())
