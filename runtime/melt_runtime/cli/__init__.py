"""The command line: parses, prints, decides nothing about models."""

__all__: list[str] = []
