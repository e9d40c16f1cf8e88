"""The faults a user can meet, each with the exit code of the script; anything else is a bug and shows a traceback."""


class PersonaError(Exception):
    """A fault with a message for a person: what, where, what was found, what to do."""

    exit_code = 1


class UsageError(PersonaError):
    """The command line or a setting is wrong."""

    exit_code = 2


class DataError(PersonaError):
    """The data cannot be used as it is."""

    exit_code = 3


class EnvironmentFault(PersonaError):
    """The machine lacks something: a network, a package, a device, space."""

    exit_code = 4


class OutOfMemory(PersonaError):
    """The memory does not hold the model, or a single example."""

    exit_code = 5


class Diverged(PersonaError):
    """The loss or the gradient is not finite any more."""

    exit_code = 6


class Interrupted(PersonaError):
    """A signal stopped the run after its state was saved; the exit code is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class VerificationFailed(PersonaError):
    """A merged model differs from base + adapter, or an exported prompt from the trained one; it was not kept."""

    exit_code = 1
