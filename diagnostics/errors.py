"""Every exception and warning of this package that a user may want to catch."""


class DiagnosticsError(ValueError):
    """A request that cannot be carried out; the message names the value, what is allowed and what to do."""


class NotARunError(DiagnosticsError):
    """Met when a path that should be a run directory holds no readable `run.json`."""


class NewerSchemaError(DiagnosticsError):
    """Met when a run was written by a newer release whose format this one does not know."""


class RunExistsError(DiagnosticsError):
    """Met when a recorder is pointed at a directory that another one records into."""


class NoAttentionError(DiagnosticsError):
    """Met when a model holds nothing that could be softmax attention."""


class CommandError(DiagnosticsError):
    """Met when a control command is malformed, or a run refuses it."""


class RecorderWarning(UserWarning):
    """Something was not observed, or the recorder switched itself off; training goes on untouched."""


class DamagedDataWarning(UserWarning):
    """Met when a file of a run cannot be read; it is named and skipped, the rest is read."""
