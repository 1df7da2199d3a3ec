"""Reading an engine's options: a mapping of names to texts, against a model that documents them."""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from helios.mesh.errors import InvalidRequest


class Options(BaseModel):
    """Options of one engine; every field has a default and a docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


O = TypeVar("O", bound=Options)  # noqa: E741


def read_options(kind: type[O], options: Mapping[str, str]) -> O:
    """Returns the options.

    Raises:
        InvalidRequest: INVALID_ENGINE_SETTINGS; it names every one that is unknown or wrong.
    """
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()]
        raise InvalidRequest(
            f"options of the engine: {'; '.join(problems)}; there are: {', '.join(kind.model_fields)}",
            reason="INVALID_ENGINE_SETTINGS",
        ) from error
