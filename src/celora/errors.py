"""What can go wrong, as a tree; each message says what was found, what was expected and what to do.

CeloraError
├── ConfigError        the configuration: every problem at once (exit code 2)
├── DataError          a source, a column, a label, a client without rows (exit code 2)
├── ModelError         a backbone or its target modules (exit code 2)
├── WireError          a frame that is truncated, foreign, damaged or of another kind
├── RunFolderError     a run folder that exists, is missing, or holds a damaged checkpoint (exit code 2)
├── FederationError    server and sites do not fit together, or cannot reach each other (exit code 2)
├── PolicyError        what a site's policy or a filter does not let leave (exit code 2)
└── QuorumError        too few usable replies in a round; the run can be resumed (exit code 4)
"""


class CeloraError(Exception):
    """Root of every error that celora raises on purpose."""


class ConfigError(CeloraError):
    """The configuration is wrong; `problems` holds one line for each mistake."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        super().__init__("\n".join([*problems, f"{count}. Nothing was run."]))


class DataError(CeloraError):
    """The data cannot be used as asked."""


class ModelError(CeloraError):
    """The backbone cannot be loaded or adapted as asked."""


class WireError(CeloraError):
    """A frame does not hold what was expected of it."""


class RunFolderError(CeloraError):
    """A run folder cannot be written, read or resumed."""


class FederationError(CeloraError):
    """Server and sites do not fit together, or cannot reach each other."""


class PolicyError(CeloraError):
    """A site's policy does not let something leave, which only the site can change; or a filter does not."""


class QuorumError(CeloraError):
    """Fewer usable replies than the quorum; what was done before the round is kept."""
