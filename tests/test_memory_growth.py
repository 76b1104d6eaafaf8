"""Nothing grows: resident memory over thousands of decoded tokens, at any depth."""

import subprocess
import sys

import pytest

CODE = """
import sys
from melt_runtime import MeltModel

def resident() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * 4096

model = MeltModel.load(sys.argv[1], device="cpu", capacity=3200)
stream = model.stream([5] * 40, max_new_tokens=3100, stop_ids=(), loops=2)
session = model.session
sizes = []
for _ in stream:
    # The cache's own rows are touched for the first time as tokens come: they are not growth.
    length = len(session.token_ids) - 1
    touched = session.plan.cache_bytes * length // session.plan.capacity
    sizes.append((length, resident() - touched))
early = [size for length, size in sizes if 90 <= length < 140]
late = [size for length, size in sizes if length >= 3090]
assert stream.result.timings.decode_tokens == 3099
print(max(late) - min(early))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
def test_three_thousand_tokens_do_not_grow_the_process(random_bundle):
    bundle = random_bundle(max_position_embeddings=4096)
    done = subprocess.run([sys.executable, "-c", CODE, str(bundle)], capture_output=True, text=True, check=True)
    # 3,000 tokens: less than 350 bytes a token, far below one row of the state.
    assert int(done.stdout) < 1_000_000, done.stdout
