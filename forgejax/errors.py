"""Every error that forgejax raises on purpose.

A message says what was given, what was expected and what to do. The entry points print it without a traceback.
"""


class ForgejaxError(Exception):
    """A failure the user can act on; its message is written for them."""


class ConfigError(ForgejaxError):
    """A configuration that cannot be run: unknown key, wrong type, impossible combination, missing file."""


class MeshError(ForgejaxError):
    """A device mesh that was asked for and cannot be had on this machine."""


class CheckpointError(ForgejaxError):
    """A checkpoint that is missing, damaged or belongs to another model or run."""


class EngineError(ForgejaxError):
    """The inference engine refused or lost a request."""


class GrammarError(ForgejaxError):
    """A grammar that no masks can be made of: what its schema asks for is not known here, or is too large."""


class OverloadedError(EngineError):
    """As many requests wait for the inference engine as it takes; the same one may be served in ``retry_after_s``."""

    def __init__(self, message: str, retry_after_s: float = 2.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GatewayError(ForgejaxError):
    """The gateway cannot serve: its port, its tokenizer or its chat template is unusable."""


class AgentError(ForgejaxError):
    """An agent program cannot be started or broke its contract."""


class EnvironmentLostError(ForgejaxError):
    """What an episode works in is no longer there: that is not the policy's doing."""


class UnscoredError(ForgejaxError):
    """Nobody can say what an episode was worth: it is masked, which is another thing than worth nothing."""


class PoolError(ForgejaxError):
    """The data pool cannot keep what it accepted, or is used against its laws."""


class DamagedJournalError(PoolError):
    """The journal's file is not as the database left it."""


class DamagedGroupError(PoolError):
    """The stored bytes of one group are not those that were accepted; every other group can be used."""


class StorageFullError(PoolError):
    """The disk under the run directory is full; nothing already accepted is lost."""


class TrainingError(ForgejaxError):
    """The run cannot go on: non-finite steps in a row, no trainable groups, a dead engine."""


class PodError(ForgejaxError):
    """The processes of a job cannot work together, or one of them is lost: the run can be resumed."""


class RunLockedError(ForgejaxError):
    """Another trainer holds this run directory."""
