"""Token data: a folder written by ``datasets.Dataset.save_to_disk``, one sequence a row.

Columns: ``input_ids``, a list of token ids; optionally ``labels``, a list as long, -100 where the token at that place
is not to be learned (the convention of transformers); without it every token counts. The order of the rows depends on
the seed and the step alone, so that a resumed run needs no state of a loader.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, load_from_disk

from melt_models.configuration import MeltConfig
from melt_models.progress import Progress
from melt_models.training.errors import TrainingError
from melt_models.training.objective import IGNORED, TokenBatch

_SCANNED_ROWS = 4096


class TokenData:
    """A data set that was checked against a model and a chunk size.

    Attributes:
        rows: number of sequences.
        tokens: number of their tokens.
    """

    def __init__(self, folder: Path, config: MeltConfig, longest_chunk: int, seed: int, is_silent: bool):
        """Opens and checks a data set; reads every id once, with progress.

        Args:
            folder: where it lies.
            config: of the teacher: vocabulary, positions, padding.
            longest_chunk: of the recipe.
            seed: of the order of rows.
            is_silent: shows no progress.

        Raises:
            TrainingError: no such data set, columns missing, of another type or of unequal lengths, ids outside the
                vocabulary, sequences shorter than a chunk, of one token or longer than the model's positions.
        """
        self._data = _open(folder)
        self._pad, self._seed = config.pad_token_id or 0, seed
        self.rows = len(self._data)
        self.tokens = _check(self._data, folder, config, max(longest_chunk, 2), is_silent)
        self._has_labels = "labels" in self._data.column_names
        self._order: tuple[int, torch.Tensor] | None = None

    def batch(self, first: int, count: int) -> TokenBatch:
        """``count`` sequences from place ``first`` on of an endless shuffled order, epoch after epoch."""
        rows = [self._data[self._row(place)] for place in range(first, first + count)]
        length = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((count, length), self._pad)
        targets = torch.full((count, length), IGNORED)
        real = torch.zeros((count, length), dtype=torch.bool)
        for index, row in enumerate(rows):
            tokens = len(row["input_ids"])
            input_ids[index, :tokens] = torch.tensor(row["input_ids"])
            targets[index, : tokens - 1] = torch.tensor(row["labels" if self._has_labels else "input_ids"][1:])
            real[index, :tokens] = True
        return TokenBatch(input_ids, targets, real)

    def _row(self, place: int) -> int:
        epoch, index = divmod(place, self.rows)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(self.rows, generator=generator))
        return int(self._order[1][index])


def _open(folder: Path) -> Dataset:
    how = "write one with datasets.Dataset.save_to_disk or python -m melt_models.training.prepare"
    try:
        data = load_from_disk(str(folder))
    except Exception as error:  # of a damaged folder datasets raises what its readers do
        raise TrainingError(f"{folder} is not a data set on disk ({error}): {how}") from error
    if not isinstance(data, Dataset):
        raise TrainingError(f"{folder} holds several splits ({', '.join(data)}): give the folder of one of them")
    if "input_ids" not in data.column_names:
        raise TrainingError(f"{folder} must have a column input_ids, got {', '.join(data.column_names)}: {how}")
    if not len(data):
        raise TrainingError(f"{folder} must have at least one row, got none: {how}")
    return data


def _check(data: Dataset, folder: Path, config: MeltConfig, shortest: int, is_silent: bool) -> int:
    """Checks every row; returns the number of tokens."""
    tokens, longest, vocab_size = 0, config.max_position_embeddings, config.vocab_size
    with Progress("checking data", len(data), "row", is_silent=is_silent) as progress:
        for table in data.with_format("arrow").iter(batch_size=_SCANNED_ROWS):
            ids, first = _lists(table, "input_ids", folder, progress.done), progress.done
            lengths = pc.list_value_length(ids)
            if (row := _first(pc.less(lengths, shortest))) is not None:
                raise TrainingError(
                    f"{folder}, row {first + row}: {lengths[row].as_py()} tokens are fewer than a chunk of {shortest}: "
                    "join short texts to longer sequences, leave them out, or lower chunk_sizes"
                )
            if (row := _first(pc.greater(lengths, longest))) is not None:
                raise TrainingError(
                    f"{folder}, row {first + row}: {lengths[row].as_py()} tokens are more than the teacher's "
                    f"max_position_embeddings of {longest}: cut the rows shorter"
                )
            flat = pc.list_flatten(ids)
            outside = pc.or_(pc.less(flat, 0), pc.greater_equal(flat, vocab_size))
            if (place := _first(outside)) is not None:
                owner = pc.list_parent_indices(ids)
                raise TrainingError(
                    f"{folder}, row {first + owner[place].as_py()}: token id {flat[place].as_py()} is outside the "
                    f"vocabulary of {vocab_size}: tokenize the data with the teacher's own tokenizer"
                )
            if "labels" in table.column_names:
                _check_labels(_lists(table, "labels", folder, first), folder, first, vocab_size, lengths)
            tokens += len(flat)
            progress.advance(len(ids))
    return tokens


def _lists(table: pa.Table, name: str, folder: Path, first: int) -> pa.ChunkedArray:
    """A column of lists of whole numbers, none of them missing."""
    column = table[name]
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise TrainingError(f"{folder}: {name} must be lists of whole numbers, got {kind}")
    if (row := _first(pc.is_null(column))) is not None:
        raise TrainingError(f"{folder}, row {first + row}: {name} is missing: leave the row out")
    if (place := _first(pc.is_null(pc.list_flatten(column)))) is not None:
        row = pc.list_parent_indices(column)[place].as_py()
        raise TrainingError(f"{folder}, row {first + row}: {name} has a place without a number: leave the row out")
    return column


def _check_labels(labels: pa.ChunkedArray, folder: Path, first: int, vocab_size: int, lengths: pa.ChunkedArray) -> None:
    sizes = pc.list_value_length(labels)
    if (row := _first(pc.not_equal(sizes, lengths))) is not None:
        raise TrainingError(
            f"{folder}, row {first + row}: labels must be as long as input_ids ({lengths[row].as_py()}), "
            f"got {sizes[row].as_py()}: write -100 where a token is not to be learned"
        )
    flat = pc.list_flatten(labels)
    outside = pc.and_(pc.not_equal(flat, IGNORED), pc.or_(pc.less(flat, 0), pc.greater_equal(flat, vocab_size)))
    if (place := _first(outside)) is not None:
        row = first + pc.list_parent_indices(labels)[place].as_py()
        raise TrainingError(
            f"{folder}, row {row}: label {flat[place].as_py()} is neither {IGNORED} nor inside the vocabulary of "
            f"{vocab_size}: tokenize the data with the teacher's own tokenizer"
        )


def _first(mask: Any) -> int | None:
    """The index of the first true value, None without one."""
    place = pc.index(mask, True).as_py()
    return None if place < 0 else place
