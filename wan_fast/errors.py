"""The one error that is the user's to read."""


class WanFastError(ValueError):
    """The request cannot be carried out: what is wrong, the value seen, and what to do, in one line."""
