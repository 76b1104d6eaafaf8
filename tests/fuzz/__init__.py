"""Damaged inputs by the thousand. What may come out, soon: an answer or one of this project's errors.

pool.py         runs cases in processes that may die or hang, which is a finding and not the end
edits.py        damage to JSON values and to bytes
graphs.py       damage to ONNX graphs
odd.py          cases that fail in every way, for the tests of the pool
bundles.py      the cases over a bundle
checkpoints.py  the cases over checkpoints, as an export reads them
calls.py        odd arguments to whatever is public
run.py          the command: python tests/fuzz/run.py bundles --count 10000
"""
