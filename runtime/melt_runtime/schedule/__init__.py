"""Which tokens of which sequences take their next loop in the next pass. Pure: knows neither buffers nor text."""

__all__: list[str] = []
