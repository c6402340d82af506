"""The errors of `tl_dla`: each is a `TlDlaError` and the built-in class a user would catch."""


class TlDlaError(Exception):
    """Base of every error raised by `tl_dla`."""


class TokenError(TlDlaError, ValueError):
    """A prompt, an answer or a position that cannot be what was meant."""


class UnsupportedModelError(TlDlaError, NotImplementedError):
    """A part of the model that `tl_dla` does not understand: it is named, with what still works."""


class IncompleteCacheError(TlDlaError, KeyError):
    """A supplied cache lacks activations: their hooks are named."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class ReconstructionError(TlDlaError, ValueError):
    """The rows do not add up to what the model returned."""


class ArgumentError(TlDlaError, ValueError):
    """An argument that cannot be what was meant."""


class ModelNotFoundError(TlDlaError, FileNotFoundError):
    """There is no model under the name or path given; the message says what to do."""


class OutputFolderError(TlDlaError, FileExistsError):
    """An output folder that holds something else, or is damaged. Nothing in it was changed."""
