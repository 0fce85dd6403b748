"""Errors as OpenAI's clients expect them: a status and an object `{"error": {message, type, param, code}}`."""

from typing import Any

from pydantic import ValidationError

from loragen_agents.errors import GrammarError, PromptError, RegistryError


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status code.
        message: what is wrong, what was expected and how to mend it.
        kind: OpenAI's `type`: invalid_request_error, authentication_error, rate_limit_error or server_error.
        param: the field of the request that is wrong, such as `messages[0].content`.
        code: OpenAI's machine-readable word, such as `model_not_found`.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, headers

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def api_error(error: BaseException) -> ApiError:
    """Give any exception as an `ApiError`: status 400 where the request is to blame, else 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RegistryError):
        return ApiError(400, str(error), param="tools", code="invalid_tool")
    if isinstance(error, GrammarError):
        return ApiError(400, str(error), param="tools", code="unsupported_schema")
    if isinstance(error, PromptError):
        return ApiError(400, str(error), code="invalid_prompt")
    # What went wrong inside is written to the log; a client can do nothing with it, and it may name paths.
    return ApiError(
        500, f"the server failed on this request ({type(error).__name__}); its log says more", kind="server_error"
    )


def validation_error(error: ValidationError, fields: frozenset[str]) -> ApiError:
    """The first thing that pydantic found wrong with a request.

    Args:
        error: what pydantic says.
        fields: names of all fields; other parts of pydantic's location name alternatives of a union, which no client
            knows.
    """
    first = error.errors(include_url=False, include_input=False)[0]
    location = list(first["loc"])
    unknown = location[-1] if first["type"] == "extra_forbidden" else None
    param = ""
    for part in location:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part in fields or part is unknown:
            param += f".{part}" if param else part
    param = param[:200]
    if unknown is not None:
        return ApiError(400, f"unknown field {param!r}; leave it out", param=param, code="unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param or 'the request'}: {message}", param=param or None, code="invalid_value")
