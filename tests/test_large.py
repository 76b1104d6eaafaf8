"""Full-size models with random weights, as files on disk: export in bounded memory, and the plan beside a process.

Left out unless asked for (``make test-large``): about 15 minutes and 9 GB of disk on 2 cores.
"""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from tolerances import PLANNED_MEMORY

from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.memory.estimate import plan_memory

pytestmark = pytest.mark.large
EXPORT_LIMIT = 3e9
MEASURE = """
import json, sys
from dataclasses import asdict
sys.path.insert(0, sys.argv[1])
from memory import measure
print(json.dumps(asdict(measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))))
"""


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def gigabytes(text: str) -> float:
    amount, unit = text.split()
    return float(amount) * {"MB": 1e6, "GB": 1e9}[unit]


@pytest.mark.parametrize(("shape", "caches"), [("ouro-1.4b", 4), ("melt-1.6b", 1)])
def test_a_full_size_checkpoint(shape, caches, tmp_path, monkeypatch):
    monkeypatch.setenv("MELT_CACHE_DIR", str(tmp_path / "cache"))
    checkpoint, bundle = str(tmp_path / shape), str(tmp_path / "bundle")
    run("benchmarks/make_checkpoint.py", shape, checkpoint)
    said = run("export.py", checkpoint, "--out", bundle, "--precision", "int4")
    assert gigabytes(re.search(r"at most (.*) of memory", said)[1]) < EXPORT_LIMIT
    manifest = read_manifest(bundle)
    # KV cache of a token at 2 bytes: 0.197 MB for MELT, 0.786 MB for Ouro with 4 loops (arXiv 2605.07721).
    assert plan_memory(manifest, 1000, loops=4).cache_bytes_per_token == 2 * caches * 196_608
    run("-c", MEASURE, "benchmarks", bundle, "1", "500")  # the first load makes the copy that later ones map
    for loops, context in ((1, 1000), (4, 1000), (4, 4000)):
        point = json.loads(run("-c", MEASURE, "benchmarks", bundle, str(loops), str(context)))
        assert point["peak"] == pytest.approx(point["plan"], rel=PLANNED_MEMORY), point
