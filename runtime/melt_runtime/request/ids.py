"""Token ids as a caller gives them, checked."""

import sys
from collections.abc import Callable, Sequence

import numpy as np

from melt_runtime.arguments import is_whole, shown
from melt_runtime.bundle.contract import ModelShape
from melt_runtime.errors import TokenError


def check_ids(ids: Sequence[int], shape: ModelShape, require_fit: Callable[[int], None]) -> list[int]:
    """Token ids as Python's integers.

    Args:
        ids: a sequence of whole numbers, Python's or numpy's, or an array of them; never bytes or truth values.
        shape: the model.
        require_fit: refuses a number of tokens, before each is looked at.

    Raises:
        TokenError: no ids, not whole numbers, or outside the vocabulary.
    """
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise TokenError(f"token ids must be whole numbers in one row, got {ids.dtype} {list(ids.shape)}")
        require_fit(len(ids))
        tokens = ids.tolist()
    else:
        if not isinstance(ids, Sequence) or isinstance(ids, str | bytes | bytearray | memoryview):
            raise TokenError(f"token ids must be a sequence of whole numbers, got {shown(ids)}")
        require_fit(_length(ids))
        for token in ids:
            if not is_whole(token):
                raise TokenError(f"token ids must be whole numbers, got {shown(token)} among them")
        tokens = [int(token) for token in ids]
    if not tokens:
        raise TokenError("token ids must be a sequence of at least one")
    outside = [token for token in tokens if not 0 <= token < shape.vocab_size]
    if outside:
        found = ", ".join(shown(token) for token in outside[:8])
        raise TokenError(f"token ids must be in [0, {shape.vocab_size}), got [{found}]")
    return tokens


def _length(ids: Sequence[int]) -> int:
    """How many there are, where Python can count them."""
    try:
        return len(ids)
    except OverflowError:  # a range of more than a machine's integers
        return sys.maxsize
