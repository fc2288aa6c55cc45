"""MLflow's own errors: what both doors answer where the server would, code and words. Pure."""

from __future__ import annotations

#: mlflow.exceptions.ERROR_CODE_TO_HTTP_STATUS, as far as it is needed here.
STATUS_OF = {
    "INVALID_PARAMETER_VALUE": 400,
    "RESOURCE_ALREADY_EXISTS": 400,
    "BAD_REQUEST": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "RESOURCE_DOES_NOT_EXIST": 404,
    "INTERNAL_ERROR": 500,
    "NOT_IMPLEMENTED": 501,
    "TEMPORARILY_UNAVAILABLE": 503,
}


class ApiError(Exception):
    """What MLflow's API answers instead of a result.

    Args:
        error_code: one of STATUS_OF.
        message: for the caller's user.
    """

    def __init__(self, error_code: str, message: str) -> None:
        super().__init__(message)
        self.error_code = error_code
        self.status = STATUS_OF[error_code]

    def body(self) -> dict[str, str]:
        """Return the JSON object of the answer."""
        return {"error_code": self.error_code, "message": str(self)}


def invalid(message: str) -> ApiError:
    """Return the error for a request that MLflow would never take."""
    return ApiError("INVALID_PARAMETER_VALUE", message)


def missing(message: str) -> ApiError:
    """Return the error for something that is not there."""
    return ApiError("RESOURCE_DOES_NOT_EXIST", message)


def away(message: str) -> ApiError:
    """Return the error for what can be done again later."""
    return ApiError("TEMPORARILY_UNAVAILABLE", message)


class kept:  # noqa: N801  # reads as a word: `with kept():`
    """What the disk does not take is the client's to send again."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            why = error.strerror or "the daemon is busy with its disk"
            raise away(f"not accepted: {why}; it can be sent again") from error
