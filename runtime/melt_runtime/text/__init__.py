"""Token ids to text and back: tokenizer, chat templates, messages."""

__all__: list[str] = []
