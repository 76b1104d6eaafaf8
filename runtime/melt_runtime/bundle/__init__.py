"""A bundle as it is written down: the graphs' contract, the manifest, what was measured of it. Opens nothing."""

__all__: list[str] = []
