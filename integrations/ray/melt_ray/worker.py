"""One actor of a batch: a model whose slots answer range after range."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melt_ray.bundles import BundleIdentity, node_name
from melt_ray.parts import part_path, read_part, write_part
from melt_ray.rows import RowRange, read_rows
from melt_ray.settings import BatchSettings
from melt_runtime import BatchError, GenerationConfig, GenerationResult, MeltError, MeltModel
from melt_runtime.arguments import is_whole, shown
from melt_runtime.cli.json_lines import one_line
from melt_runtime.errors import TokenError
from melt_runtime.text.messages import check_messages


@dataclass(frozen=True)
class Tally:
    """What came of a range.

    Attributes:
        part: where its answers stand.
        node: that wrote them.
        rows: in it.
        errors: of them could not be answered.
        tokens: of answers.
        prompt_tokens: of prompts.
        passes: runs of the loop graph, each counted for every answer that it belonged to.
        fault: why nothing came of it, where that is so; Ray would wrap an exception in its own.
    """

    part: str
    node: str
    rows: int = 0
    errors: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    passes: int = 0
    fault: str = ""


class Worker:
    """Answers ranges, and writes each when it is done."""

    def __init__(self, expected: BundleIdentity, out: str, settings: BatchSettings):
        """Loads the model; where that fails, every range is told why."""
        self._out, self._settings, self._node = Path(out), settings, node_name()
        self._fault = ""
        try:
            self._model, self._config = self._load(expected), GenerationConfig(**settings.generation)
        except (MeltError, ValueError, OSError) as error:
            self._fault = str(error)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Answers a range, unless it is written: a task whose actor was lost after writing is run again."""
        rows = RowRange(**row)
        path = part_path(self._out, rows, self._settings.format)
        if self._fault:
            return vars(Tally(str(path), self._node, fault=self._fault))
        try:
            if path.is_file():
                return vars(self._tally(path, read_part(path)))
            answers = list(self._answers(rows))
            self._write(path, answers)
            return vars(self._tally(path, answers))
        except (MeltError, ValueError, OSError) as error:
            return vars(Tally(str(path), self._node, fault=str(error)))

    def _load(self, expected: BundleIdentity) -> MeltModel:
        """The model.

        Raises:
            MeltError, ValueError, OSError: this node has not what the driver's has; or the bundle cannot be loaded.
        """
        expected.require_here()
        settings = self._settings
        return MeltModel.load(
            expected.path,
            device=settings.device,
            capacity=settings.capacity,
            loops=settings.most_loops,
            threads=settings.threads_of_actor,
            kv_cache=settings.kv_cache,
            chunk=settings.chunk,
            slots=settings.slots,
        )

    def _write(self, path: Path, answers: list[dict[str, Any]]) -> None:
        write_part(path, answers)

    def _answers(self, rows: RowRange) -> Iterator[dict[str, Any]]:
        """A row of the part for each row of the file."""
        prompts: dict[int, Any] = {}
        errors: dict[int, Exception] = {}
        for number, value in enumerate(read_rows(rows, self._settings.column), start=rows.start):
            try:
                prompts[number] = _as_prompt(value)
            except (TokenError, ValueError) as error:
                errors[number] = error
        results = {**errors, **self._generate(prompts)}
        for number in range(rows.start, rows.stop):
            yield {"file": rows.path, "row": number, **_columns(results[number])}

    def _generate(self, prompts: Mapping[int, Any]) -> dict[int, GenerationResult | Exception]:
        """What came of each prompt, by its row."""
        numbers = list(prompts)
        found: dict[int, GenerationResult | Exception] = {}
        try:
            with self._model.stream_batch(list(prompts.values()), self._config, self._settings.raw) as stream:
                for place, result in stream:
                    found[numbers[place]] = result
        except BatchError as error:
            found.update({numbers[place]: one for place, one in error.errors.items()})
        return found

    def _tally(self, path: Path, rows: list[dict[str, Any]]) -> Tally:
        answered = [row for row in rows if row["error"] is None]
        return Tally(
            part=str(path),
            node=self._node,
            rows=len(rows),
            errors=len(rows) - len(answered),
            tokens=sum(len(row["tokens"]) for row in answered),
            prompt_tokens=sum(row["prompt_tokens"] for row in answered),
            passes=sum(row["passes"] for row in answered),
        )


def _as_prompt(value: object) -> Any:
    """A prompt: text, messages or token ids.

    Raises:
        ValueError, TokenError: it is none; or what was wrong with the row.
    """
    if isinstance(value, ValueError):
        raise value
    if value is None:
        raise ValueError("the prompt is null: give text, messages or token ids")
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("the prompt is empty: give at least one character")
        return value
    if isinstance(value, list) and value:
        return value if all(is_whole(one) for one in value) else check_messages(value, takes_parts=True)
    raise ValueError(f"the prompt must be text, messages or token ids, got {shown(value)}")


def _columns(result: GenerationResult | Exception) -> dict[str, Any]:
    """The columns of a part beside file and row."""
    if isinstance(result, Exception):
        return {"error": one_line(result)}
    timings = result.timings
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "tokens": list(result.token_ids),
        "loops_per_token": list(result.loops_per_token),
        "prompt_tokens": result.prompt_tokens,
        "passes": result.passes,
        "seconds": round(timings.prefill_seconds + timings.decode_seconds, 6),
        "error": None,
    }
