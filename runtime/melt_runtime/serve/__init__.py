"""An HTTP server with OpenAI's endpoints, in which depth is a field of the request. Extra ``serve``."""

__all__: list[str] = []
