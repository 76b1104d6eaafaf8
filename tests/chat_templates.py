"""Chat templates in the forms that public models use, and conversations to render with them."""

from pathlib import Path

FAMILIES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}


def _said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


_CALL = {
    "id": "abc123xyz",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich <3", "days": [1, 2.5, None], "a": True}},
}

CONVERSATIONS = {
    "one": [_said("user", "Hello")],
    "system": [_said("system", "Be brief."), _said("user", "Hello")],
    "empty system": [_said("system", ""), _said("user", "Hello")],
    "turns": [_said("user", "One"), _said("assistant", "Two"), _said("user", "Three"), _said("assistant", "Four")],
    "turns, user last": [_said("user", "a"), _said("assistant", "b"), _said("user", "c")],
    "letters": [_said("user", "Grüße, 世界 🙂 <b>\"bold\"</b> & 'more' \u2028 \x00 {{ x }} {% if %} {# c #}")],
    "code": [_said("user", "\n\n```py\nfor x in y:\n\tprint(x)\\n\n```\n  ")],
    "spaces": [_said("user", "  in front and behind \n"), _said("assistant", "\n\n x \n"), _said("user", "\ty")],
    "two users": [_said("user", "one"), _said("user", "two")],
    "late system": [_said("user", "one"), _said("assistant", "two"), _said("system", "x"), _said("user", "y")],
    "assistant first": [_said("assistant", "hi"), _said("user", "two")],
    "thoughts": [_said("user", "a"), _said("assistant", "<think>\nhm\n</think>\n\nb"), _said("user", "c")],
    "thoughts at the end": [_said("user", "a"), _said("assistant", "<think>\nhm\n</think>\n\nb")],
    "thoughts alone": [_said("user", "a"), _said("assistant", "<think>\nhm")],
    "reasoning": [_said("user", "a"), _said("assistant", "b", reasoning_content="because", thinking=None)],
    "thinking": [_said("user", "a"), _said("assistant", "b", thinking="because"), _said("user", "c")],
    "tools": [
        _said("user", "Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        _said("tool", '{"degrees": 21}', tool_call_id="abc123xyz", name="weather"),
        _said("assistant", "21 degrees."),
        _said("user", "Thanks"),
    ],
    "two calls": [
        _said("user", "Weather?"),
        _said("assistant", "I look.", tool_calls=[_CALL, {**_CALL, "id": "def456uvw"}]),
        _said("tool", "21", tool_call_id="abc123xyz"),
        _said("tool", "22", tool_call_id="def456uvw"),
    ],
    "names": [_said("user", "hi", name="Ann"), _said("assistant", "ho", name="Bob", extra={"a": [1, "é"]})],
    "unknown role": [_said("critic", "hm"), _said("user", "x")],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]},
    ],
    "empty user": [_said("user", "")],
    "blank user": [_said("system", "Be brief."), _said("user", " \n")],
    "empty answer": [_said("user", "a"), _said("assistant", ""), _said("user", "b")],
    "empty call": [_said("user", "a"), _said("assistant", "", tool_calls=[_CALL]), _said("tool", "", name="weather")],
    "empty parts": [_said("user", "a"), _said("assistant", "b"), _said("user", [])],
    "part and text": [_said("user", [{"type": "text", "text": "a"}]), _said("assistant", " b"), _said("user", "c")],
    "answer in parts": [_said("user", "a"), _said("assistant", [{"type": "text", "text": x} for x in ("b ", "c ")])],
    "long": [_said("user" if number % 2 == 0 else "assistant", f"line {number}\n" * 40) for number in range(41)],
}

TAKE_PARTS = {"gemma-3", "macros"}
"""Templates that read a content which is a list; the others would print it as Python writes it."""
