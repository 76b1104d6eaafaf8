"""The one kind of error that training raises for bad input."""


class TrainingError(Exception):
    """A recipe, data set, model or folder that training cannot use; the message says what to change."""
