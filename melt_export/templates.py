"""A checkpoint's chat template and special tokens, as transformers would read them from its folder.

The bundle's template is one file that anything which knows Jinja can render: the special tokens that it names are set
at its top.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from melt_models.configuration import MeltConfig
from melt_models.families import CORRECT_OURO_IDS
from melt_models.forms import is_there, read_json
from melt_runtime.bundle.manifest import CHAT_TEMPLATE_NAME
from melt_runtime.errors import BundleError
from melt_runtime.text.codec import read_template
from melt_runtime.text.templates import ChatTemplate

SETTINGS_NAME, MAP_NAME = "tokenizer_config.json", "special_tokens_map.json"
_MORE_TEMPLATES = "additional_chat_templates"
_DEFAULT = "default"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of the special tokens that every tokenizer may have."""
_OURO_SAYS = "<|endoftext|>"  # for begin, end and padding alike: wrong for the first two


def chat_template(
    folder: Path, config: MeltConfig | None, tokenizer: Tokenizer | None, faults: list[str]
) -> tuple[str, tuple[str, ...]]:
    """The checkpoint's chat template, self-contained.

    Args:
        folder: the checkpoint's.
        config: its token ids say what Ouro's special tokens are; None where it cannot be read.
        tokenizer: of its ``tokenizer.json``; None where it cannot be read.
        faults: what is wrong is added, a sentence each: a file that cannot be read or holds something else, a template
            that cannot be compiled.

    Returns:
        The template, empty where there is none, and what was chosen or is doubtful, a sentence each.
    """
    before = len(faults)
    notes: list[str] = []
    settings = _read(folder / SETTINGS_NAME, faults)
    # transformers' older files: the map counts unless the settings list their tokens themselves.
    older = {} if "added_tokens_decoder" in settings else _read(folder / MAP_NAME, faults)
    text = _choose(_named_templates(folder, settings, faults), faults, notes)
    tokens = _special_tokens({**settings, **older}, faults)
    is_ouro = {tokens.get(name) for name in ("bos_token", "eos_token")} - {None} == {_OURO_SAYS}
    if is_ouro and config is not None and tokenizer is not None:
        tokens |= _ouro_tokens(config, tokenizer)
    tokens = {name: token for name, token in tokens.items() if name in text}
    notes += [
        f"the chat template's {name} is {token!r}, which is no token of the tokenizer: it is read letter by letter"
        for name, token in tokens.items()
        if tokenizer is not None and tokenizer.token_to_id(token) is None
    ]
    if tokens:
        text = "".join(f"{{% set {name} = {_quote(token)} %}}" for name, token in tokens.items()) + _begin_anywhere(
            text
        )
    if len(faults) == before:
        try:
            ChatTemplate(text)
        except BundleError as error:
            faults.append(str(error))
    return text, tuple(notes)


def special_token(name: str, config: MeltConfig, tokenizer: Tokenizer) -> str | None:
    """The text of a special token by the configuration's id; of several that end a text the first."""
    ids = {"bos_token": config.bos_token_id, "eos_token": config.eos_token_id, "pad_token": config.pad_token_id}
    token = ids.get(name)
    token = token[0] if isinstance(token, list) else token
    return None if token is None else tokenizer.id_to_token(token)


def _read(path: Path, faults: list[str]) -> dict[str, Any]:
    """An object; an empty one where there is no file, or another thing in it."""
    return (read_json(path, faults) or {}) if is_there(path, faults) else {}


def _named_templates(folder: Path, settings: Mapping[str, Any], faults: list[str]) -> dict[str, str]:
    """Templates by name: of files where there is one, else of the settings."""
    named = [(path.stem, path) for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))]
    named.append((_DEFAULT, folder / CHAT_TEMPLATE_NAME))
    paths = {name: path for name, path in named if is_there(path, faults)}
    found = {}
    for name, path in paths.items():
        try:
            found[name] = read_template(path)
        except BundleError as error:
            faults.append(str(error))
    if paths:
        return found
    stored = settings.get("chat_template")
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {_DEFAULT: stored}
    try:
        pairs = stored.items() if isinstance(stored, dict) else [(each["name"], each["template"]) for each in stored]
        found = dict(pairs)
    except (TypeError, KeyError):
        found = {"": None}
    if not all(isinstance(part, str) for pair in found.items() for part in pair):
        faults.append(
            f"{SETTINGS_NAME}: chat_template must be text, or a list of such as "
            f'{{"name": "{_DEFAULT}", "template": "..."}}, got {type(stored).__name__}'
        )
        return {}
    return found


def _choose(templates: Mapping[str, str], faults: list[str], notes: list[str]) -> str:
    if templates and _DEFAULT not in templates:
        faults.append(f"the chat templates are named {', '.join(sorted(templates))}: name the one to take {_DEFAULT!r}")
    elif len(templates) > 1:
        others = ", ".join(sorted(set(templates) - {_DEFAULT}))
        notes.append(f"of several chat templates the one named {_DEFAULT!r} is taken, not {others}")
    return templates.get(_DEFAULT, "")


def _special_tokens(settings: Mapping[str, Any], faults: list[str]) -> dict[str, str]:
    """Texts by name, of the usual ones and of what a model has beside them; those that it has not are left out."""
    named = {name: value for name, value in settings.items() if name in SPECIAL_TOKENS and value is not None}
    named |= {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") and name not in SPECIAL_TOKENS and isinstance(value, str | dict)
    }
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(settings.get(key), dict):
            named |= settings[key]
    tokens = {}
    for name, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str) or not name.isidentifier():
            faults.append(f"{SETTINGS_NAME}: {name} must be a token's text, got {type(value).__name__}")
        else:
            tokens[name] = text
    return tokens


def _ouro_tokens(config: MeltConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """What Ouro was trained with, in a checkpoint of Ouro's or made from it."""
    ids = {name: getattr(config, name) for name in CORRECT_OURO_IDS}
    if ids != CORRECT_OURO_IDS or config.norm_placement != "sandwich":
        return {}
    texts = {name.removesuffix("_id"): tokenizer.id_to_token(token) for name, token in ids.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _begin_anywhere(template: str) -> str:
    """A template that can stand behind a tag: as text, its first whitespace would be taken for that tag's."""
    rest = template.lstrip()
    space = re.sub("\r\n?", "\n", template[: len(template) - len(rest)])
    if re.match(r"\{[%{#]-", rest):
        space = ""
    elif re.match(r"\{[%#](?!\+)", rest):  # lstrip_blocks: the line's own whitespace goes
        space = space[: space.rfind("\n") + 1]
    return (f"{{{{ {_quote(space)} }}}}" if space else "") + rest


def _quote(text: str) -> str:
    """A text as Jinja writes it, in Python and in JavaScript."""
    return json.dumps(text, ensure_ascii=False)
