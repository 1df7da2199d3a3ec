"""Finding a user's class, and making an instance of it."""

import importlib
import inspect
import sys
from importlib import metadata
from typing import Any, Final

from pydantic import Field

from helios.mesh.errors import InvalidRequest
from helios.worker.engines.custom.user_code import user_code
from helios.worker.engines.options import Options, read_options
from helios.worker.replica.engine import EngineHooks
from helios.worker.replica.engines import CLASS_OPTION
from helios.worker.replica.spec import ReplicaSpec

ENTRY_POINT_GROUP: Final = "helios.engines"
_PROTOCOL: Final = ("facts", "answer", "generate", "tokenize", "load", "close")


class LitOptions(Options):
    """What can be set with ``options`` of a model whose class is a LitAPI. What is set goes to its constructor."""

    device: str = "cpu"
    """What ``setup`` is given."""
    max_batch_size: int | None = Field(default=None, ge=1)
    """Requests that ``predict`` gets at once. None: the class decides."""
    batch_timeout: float | None = Field(default=None, ge=0)
    """How long a batch waits to be full, in seconds. None: the class decides."""
    stream: bool | None = None
    """Whether ``predict`` yields. None: the class decides."""
    enable_async: bool | None = None
    """Whether the hooks are coroutines. None: the class decides."""


def find_target(name: str) -> Any:
    """Returns the class, or the instance, that ``name`` says: ``module:Class``, or an entry point's name.

    Raises:
        InvalidRequest: CUSTOM_CLASS_NOT_FOUND.
        Bug: CUSTOM_CODE_FAILED; its module can't be imported.
    """
    if not name:
        raise _not_found(f"which class? Set the option {CLASS_OPTION!r}, or name the engine custom:<module>:<Class>")
    if ":" not in name:
        (*points,) = metadata.entry_points(group=ENTRY_POINT_GROUP, name=name)
        if not points:
            raise _not_found(f"there is no entry point {name!r} in the group {ENTRY_POINT_GROUP!r}")
        name = points[0].value
    module_name, _, attribute = name.partition(":")
    try:
        with user_code(f"importing {module_name}"):
            target: Any = _import(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except AttributeError as error:
        raise _not_found(f"{module_name} has no {attribute!r}") from error
    return target


def make_lit_api(target: Any, spec: ReplicaSpec) -> tuple[Any, LitOptions] | None:
    """Returns an instance of a LitAPI and its options; None where the target is not of that kind.

    Raises:
        InvalidRequest: INVALID_ENGINE_SETTINGS; bad options, or it has a LitSpec or a loop of its own.
        Bug: CUSTOM_CODE_FAILED; its constructor, or LitServe's check of it, failed.
    """
    # Whoever subclasses it has imported it: litserve stays optional.
    litserve: Any = sys.modules.get("litserve")
    kind = target if inspect.isclass(target) else type(target)
    if litserve is None or not issubclass(kind, litserve.LitAPI):
        return None
    options = read_options(LitOptions, {name: text for name, text in spec.options.items() if name != CLASS_OPTION})
    with user_code(f"the constructor of {kind.__name__}"):
        arguments = options.model_dump(exclude={"device"}, exclude_none=True)
        api: Any = target(**arguments) if inspect.isclass(target) else target
    if api.spec is not None:
        raise _refused(f"{kind.__name__} has a LitSpec; Helios makes OpenAI's answers itself: leave it out")
    with user_code(f"LitServe's check of {kind.__name__}"):
        api.pre_setup()
        api.loop.pre_setup(api)
    if not type(api.loop).__module__.startswith("litserve."):
        raise _refused(f"{kind.__name__} has a loop of its own; leave it out")
    if not hasattr(api, "model_path"):
        api.model_path = spec.model_path
    return api, options


def make_engine(target: Any, spec: ReplicaSpec, hooks: EngineHooks) -> Any:
    """Returns an instance of a class that implements ``Engine`` itself. Raises InvalidRequest where it does not."""
    missing = [name for name in _PROTOCOL if not hasattr(target, name)]
    if missing or not inspect.isclass(target):
        raise _refused(
            f"{getattr(target, '__name__', target)!r} is neither a litserve.LitAPI nor an engine"
            f"{': it has no ' + ', '.join(missing) if missing else ''}"
        )
    make: Any = target
    with user_code(f"the constructor of {target.__name__}"):
        return make(spec, hooks)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise _not_found(f"there is no module {name!r} on the worker's path") from error
        raise


def _not_found(problem: str) -> InvalidRequest:
    return InvalidRequest(problem, reason="CUSTOM_CLASS_NOT_FOUND")


def _refused(problem: str) -> InvalidRequest:
    # A reason that no further start is tried for, until somebody changes something.
    return InvalidRequest(problem, reason="INVALID_ENGINE_SETTINGS")
