"""melt-tiny, the reference model that ships with the repository: its task, tokenizer, training and evaluation."""

__all__: list[str] = []
