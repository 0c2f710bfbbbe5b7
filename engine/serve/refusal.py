"""Why a request gets no picture, as HTTP says it."""

import math

from sdedit.errors import ImageError, OptionError, SdeditError


class Refusal(SdeditError):
    """A request that is refused with this status. retry_s: when it may be worth another try."""

    def __init__(self, status: int, message: str, *, hint: str, retry_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status, self.retry_s = status, retry_s

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, in whole seconds, where another try makes sense."""
        return {} if self.retry_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_s)))}


def refusal(error: Exception) -> Refusal:
    """Any error as what the client is told: 400 its options, 422 its pictures, 500 what is not its fault."""
    match error:
        case Refusal():
            return error
        case OptionError():
            return Refusal(400, str(error), hint=error.hint)
        case ImageError():
            return Refusal(422, str(error), hint=error.hint)
        case SdeditError():
            return Refusal(500, str(error), hint=error.hint)
        case MemoryError():
            return Refusal(503, "out of memory", hint="try again later, or a smaller picture", retry_s=10)
    return Refusal(500, f"unexpected {type(error).__name__}", hint="the service's log has more; please report it")
