"""Nothing grows with the number of decoded tokens but the lists of what was said."""

import ctypes
import json
import subprocess
import sys

import pytest

CODE = """
import ctypes, json, sys
from melt_runtime import MeltModel

class Heap(ctypes.Structure):
    FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]

heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap

def in_use():
    found = heap()
    return sys.getallocatedblocks(), found.uordblks + found.hblkhd

model = MeltModel.load(sys.argv[1], device="cpu", capacity=800, threads=1)
stream = model.stream([5] * 40, max_new_tokens=700, stop_ids=(), loops=2)
while len(model.session.token_ids) < 140:  # the first passes allocate what stays
    next(stream)
first, early = len(model.session.token_ids), in_use()
for _ in stream:
    late = in_use()
tokens = len(model.session.token_ids) - first
assert tokens > 400, tokens
print(json.dumps([(now - then) / tokens for then, now in zip(early, late, strict=True)]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc what is allocated")
def test_hundreds_of_tokens_allocate_nothing_that_stays(random_bundle):
    """By what Python and malloc hold: what of it is resident is the system's choice, and other processes move it."""
    bundle = random_bundle(max_position_embeddings=4096)
    done = subprocess.run([sys.executable, "-c", CODE, str(bundle)], capture_output=True, text=True, check=True)
    blocks, native = json.loads(done.stdout)
    # A token: its id is an object, and stands in lists. A row of the smallest buffer has 256 bytes.
    assert blocks < 1.5
    assert native < 100
