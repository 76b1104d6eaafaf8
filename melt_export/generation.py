"""A checkpoint's ``generation_config.json`` as the defaults of a bundle, read as transformers reads it.

Where the file stands it counts, and ``config.json`` does not: its end-of-text tokens replace those of ``config.json``
rather than join them. Without ``do_sample`` the answer is greedy, whatever temperature is written beside it; with it,
what is absent has the default of transformers (temperature 1, top-k 50). One thing is otherwise: a file that names no
end-of-text token leaves those of ``config.json``, since an answer that never ends is nobody's wish.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from melt_models.configuration import MeltConfig
from melt_models.configuration_form import TokenId, TokenIds, outside
from melt_models.families import CORRECT_OURO_IDS
from melt_models.forms import STRICT, fitting, is_there, read_json, shown
from melt_runtime.bundle.manifest import GENERATION_CONFIG_NAME
from melt_runtime.request.generation_config import GenerationConfig


@with_config(STRICT)
class _Form(TypedDict, total=False):
    bos_token_id: TokenId | None
    eos_token_id: TokenIds
    pad_token_id: Annotated[int, Field(ge=-1, lt=1 << 20)] | None
    do_sample: bool | None
    temperature: Annotated[float, Field(ge=0, le=1e3)] | None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    min_p: Annotated[float, Field(ge=0, le=1)] | None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None
    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None
    stop_strings: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ]


_FORM = TypeAdapter(_Form)
# What transformers samples with where a file says nothing.
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
# Fields that name tokens, with what of their value does, also where the runtime passes the field over.
_TOKEN_FIELDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        (
            *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"),
            *("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids"),
        ),
        lambda value: value,
    ),
    "forced_decoder_ids": lambda value: [pair[-1:] for pair in value] if _is_pairs(value) else None,
    "sequence_bias": lambda value: [pair[0] for pair in value] if _is_pairs(value) else None,
    "logit_bias": lambda value: (
        [int(token) for token in value if token.isdecimal()] if isinstance(value, dict) else None
    ),
}
_SILENT = ("transformers_version", "use_cache", "cache_implementation", "trust_remote_code")
# Written out by many tools, with the value that changes nothing.
_NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "num_assistant_tokens"), 1),
    **dict.fromkeys(("length_penalty", "typical_p", "encoder_repetition_penalty"), 1.0),
}


def read_generation(folder: Path, config: MeltConfig | None, faults: list[str]) -> tuple[GenerationConfig, list[str]]:
    """Reads the file where there is one; else the end-of-text tokens of ``config.json`` are all.

    Args:
        folder: the checkpoint's.
        config: its configuration; None where that cannot be read, and only the file itself is checked.
        faults: what is wrong is added, a sentence each.

    Returns:
        The defaults of generation, and what was corrected or passed over, a sentence each.
    """
    # A threshold below 1 says that the exit gate was trained, and when to heed it.
    threshold = config.early_exit_threshold if config and config.exit_gate and config.early_exit_threshold < 1 else None
    plain = GenerationConfig(stop_ids=config.stop_ids if config else (), exit_threshold=threshold)
    path = folder / GENERATION_CONFIG_NAME
    values = read_json(path, faults) if is_there(path, faults) else None
    if values is None:
        return plain, []
    before, notes = len(faults), list[str]()
    good = {name: value for name, value in fitting(_FORM, values, path.name, faults).items() if value is not None}
    for name, read in _TOKEN_FIELDS.items():
        ids = _token_ids(read(values.get(name)))
        faults += [f"{path.name}: {fault}" for fault in outside(name, ids, config.vocab_size if config else None)]
    changes = _sampling(good, path.name, faults, notes)
    changes["stop_ids"] = _stop_ids(good, config, notes) if config else ()
    if stop := good.get("stop_strings"):
        changes["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    for name in ("repetition_penalty", "max_new_tokens"):
        if name in good:
            changes[name] = good[name]
    foreign = sorted(
        name for name, value in values.items() if name not in _Form.__annotations__ and _counts(name, value)
    )
    if foreign:
        notes.append(f"keys of {path.name} that the runtime does not have are passed over: {', '.join(foreign)}")
    if len(faults) > before:
        return plain, notes
    try:
        return GenerationConfig(**changes, exit_threshold=threshold), notes
    except ValueError as error:
        faults.append(f"{path.name}: {error}")
        return plain, notes


def _sampling(good: Mapping[str, Any], where: str, faults: list[str], notes: list[str]) -> dict[str, Any]:
    """The fields of sampling; none where the file wants greedy search."""
    given = {name: good[name] for name in _SAMPLING if name in good}
    if not good.get("do_sample"):
        passed = [f"{name} {value:g}" for name, value in given.items() if value != _SAMPLING[name]]
        if passed:
            notes.append(f"{where} does not set do_sample: answers are greedy, and {', '.join(passed)} passed over")
        return {}
    if given.get("temperature") == 0:
        faults.append(f"{where}: temperature must be above 0 where do_sample is true, got 0: set do_sample to false")
    return {**_SAMPLING, **given}


def _stop_ids(good: Mapping[str, Any], config: MeltConfig, notes: list[str]) -> tuple[int, ...]:
    given = good.get("eos_token_id")
    if given is None:
        return config.stop_ids
    ids = tuple(dict.fromkeys(given if isinstance(given, list) else [given]))
    trained = {name: getattr(config, name) for name in CORRECT_OURO_IDS}
    if trained == CORRECT_OURO_IDS and ids == (0,) and good.get("bos_token_id", 0) == 0:
        # Published beside Ouro's config.json, with the same error; also where the weights became a MELT's.
        notes.append("eos 0 of Ouro's published generation_config.json is corrected to 2 (<|im_end|>)")
        return config.stop_ids
    if ids != config.stop_ids:
        notes.append(
            f"generation_config.json ends a text at {shown(list(ids))}, config.json at {list(config.stop_ids)}: "
            "the first counts, as in transformers"
        )
    return ids


def _token_ids(value: Any) -> list[int]:
    """Every whole number in nested lists."""
    if isinstance(value, list):
        return [token for part in value for token in _token_ids(part)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)


def _counts(name: str, value: Any) -> bool:
    """Whether a key that the runtime does not have would change an answer."""
    silent = name.startswith(("_", "output_", "return_")) or name in _SILENT
    return not silent and bool(value) and _NEUTRAL.get(name) != value
