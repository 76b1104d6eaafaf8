"""The kinds of ``config.json`` that are read, by name; a table without code, for the command line's help."""

KNOWN_TYPES = ("melt", "ouro", "llama")
