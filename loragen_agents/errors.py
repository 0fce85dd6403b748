"""Errors that a user of the package can meet.

Every message names the thing that is wrong, says what was expected and how to mend it. Each class also derives from the
built-in exception that a caller without this package at hand would expect.
"""


class LoRAGenError(Exception):
    """Base of all errors that this package raises on purpose."""


class RegistryError(LoRAGenError, ValueError):
    """A tool or a registry of tools is not usable."""


class ArgumentError(LoRAGenError, ValueError):
    """An Action Input and a tool's argument schema do not fit each other."""


class PromptError(LoRAGenError, ValueError):
    """A conversation can't be turned into a prompt."""


class GrammarError(LoRAGenError, ValueError):
    """A registry can't be turned into a grammar, or text was held against a grammar that refuses it."""


class ModelLoadError(LoRAGenError, RuntimeError):
    """A language model can't be found, fetched, checked or converted."""


class CheckpointError(LoRAGenError, ValueError):
    """A generator checkpoint or a folder of LoRA weights is damaged or belongs to another model."""


class DataError(LoRAGenError, ValueError):
    """A data file is damaged or not in the format that was asked for."""


class ServerError(LoRAGenError, RuntimeError):
    """A server can't be started as asked."""


class ServiceError(LoRAGenError, RuntimeError):
    """A service that makes specialisations can't be asked, or refuses."""
