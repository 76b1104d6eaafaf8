"""Where graphs run: execution providers, CUDA, what this machine lacks."""

__all__: list[str] = []
