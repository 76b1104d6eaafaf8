"""Opens a bundle: its files compared with its manifest, its memory found to suffice, its graphs opened fast."""

__all__: list[str] = []
