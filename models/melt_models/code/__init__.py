"""melt-code: a small MELT model of Python source code, from what is installed beside this package."""

__all__: list[str] = []
