"""Ten lines of Python: load a bundle, ask, watch the answer arrive. ``python examples/ask.py build/melt-tiny``."""

import sys

from melt_runtime import MeltModel

model = MeltModel.load(sys.argv[1], device="cpu", capacity=1024)
session = model.new_session()
facts = "Ana reports to Ben. Ben reports to Cleo."
for question in (f"{facts} Who is two levels above Ana?", "Who is one level above Ben?"):
    print(question)
    for piece in session.stream(question, loops=4):
        print(piece, end="", flush=True)
    print()
