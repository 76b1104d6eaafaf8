"""The programs of ``examples`` run as their first lines say. The page has tests of its own (test_web.py)."""

import subprocess
import sys

from conftest import ROOT


def test_ten_lines_of_python(tiny_bundle):
    run = [sys.executable, ROOT / "examples" / "ask.py", tiny_bundle]
    lines = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.strip() for line in lines[1::2]] == ["Cleo.", "Cleo."]
