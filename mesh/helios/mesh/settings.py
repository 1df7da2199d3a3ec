"""Settings: frozen, typed, documented, and complete before a process does anything.

Precedence: defaults < file (TOML, ``--settings-file``) < environment ``HELIOS_<PROCESS>__<FIELD>`` < flags. Unknown
keys and bad values stop the process with the full list of errors. pydantic-settings is used rather than argparse and a
parser of our own: one declaration gives the file, the environment, the flags and their checks.
"""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NoReturn, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from helios.mesh.errors import InvalidRequest
from helios.mesh.identity import IdentityFiles

# What a process needs beside its drains: servers say goodbye, databases close, traces go out.
CLOSE_SECONDS: Final = 4.0


class MeshSettings(BaseModel):
    """How a process takes part in the mesh."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tls: Literal["files", "off"] = "files"
    """``files``: certificates of ``identity_directory``. ``off``: plain text, only where a sidecar encrypts."""
    identity_directory: Path | None = None
    """Directory with ``tls.crt``, ``tls.key`` and ``ca.crt``. Needed with ``tls = files``."""

    @property
    def identity(self) -> IdentityFiles | None:
        """The leaf of this process, None without TLS. Raises InvalidRequest where the settings name none."""
        if self.tls == "off":
            return None
        if self.identity_directory is None:
            raise InvalidRequest("mesh.identity_directory is needed while mesh.tls is 'files'")
        return IdentityFiles(self.identity_directory)


class ProcessSettings(BaseSettings):
    """Settings that every process has."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_nested_delimiter="__",
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        use_attribute_docstrings=True,
    )
    process_name: ClassVar[str] = "process"

    mesh: MeshSettings = Field(default_factory=MeshSettings)
    """Identity and TLS."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""
    ops_listen: str = "127.0.0.1:0"
    """``host:port`` of ``/metrics``, ``/healthz`` and ``/readyz`` over plain HTTP; port 0 takes a free one, empty:
    none."""
    otlp_endpoint: str = ""
    """OTLP/gRPC collector for traces, such as ``127.0.0.1:4317``. Empty: no traces are sent."""
    stop_seconds: float = Field(default=14.0, gt=0)
    """How long a stop may take, or longer where the process has a drain time that needs it. A process that has not
    ended by then logs what it waits for and ends with exit status 1. 14: `helios up` kills what is there a second
    later."""

    @property
    def stop_limit_seconds(self) -> float:
        """How long the whole stop may take."""
        return self.stop_seconds

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Orders the sources: flags, environment, file; no .env file and no secrets directory are read."""
        file = settings_cls.model_config.get("toml_file")
        toml = (TomlConfigSettingsSource(settings_cls, file),) if file else ()
        return (init_settings, env_settings, *toml)


S = TypeVar("S", bound=ProcessSettings)


def load_settings(settings_class: type[S], arguments: list[str]) -> S:
    """Reads the settings of a process; exits with status 2 and the full list of errors where they are wrong.

    ``--settings-file FILE`` names the file, ``--print-settings`` prints what is in force (secrets redacted) and exits
    with 0.
    """
    rest, file, is_print = _own_flags(arguments)
    named = _bind(settings_class, file)
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(named, cli_parse_args=rest, cli_prog_name=_program(named))
        settings = named(**source())
    except ValidationError as error:
        _fail(named, [_line(entry) for entry in error.errors()])
    except (SettingsError, OSError) as error:
        _fail(named, [str(error)])
    if is_print:
        sys.stdout.write(json.dumps(settings.model_dump(mode="json"), indent=2, default=str) + "\n")
        raise SystemExit(0)
    return settings


def to_arguments(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns flags that stand for nested settings: ``{"mesh": {"tls": "off"}}`` is ``["--mesh.tls=off"]``."""
    flags: list[str] = []
    for key, value in settings.items():
        name = f"{prefix}{key.replace('_', '-')}"
        if isinstance(value, dict):
            flags += to_arguments(value, f"{name}.")
        elif isinstance(value, list | tuple):
            flags += [f"--{name}={entry}" for entry in value]
        elif isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags.append(f"--{name}={value.get_secret_value() if isinstance(value, SecretStr) else value}")
    return flags


def _own_flags(arguments: list[str]) -> tuple[list[str], str | None, bool]:
    rest: list[str] = []
    file, is_print = None, False
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--print-settings":
            is_print = True
        elif argument == "--settings-file":
            file = next(remaining, None)
        elif argument.startswith("--settings-file="):
            file = argument.partition("=")[2]
        else:
            rest.append(argument)
    return rest, file, is_print


def _bind(settings_class: type[S], file: str | None) -> type[S]:
    prefix = f"HELIOS_{settings_class.process_name.upper().replace('.', '_')}__"
    config = SettingsConfigDict(env_prefix=prefix, toml_file=file)
    members = {"model_config": config, "__doc__": settings_class.__doc__}
    return cast("type[S]", type(settings_class.__name__, (settings_class,), members))


def _program(settings_class: type[ProcessSettings]) -> str:
    return f"python -m helios.{settings_class.process_name}"


def _line(entry: Any) -> str:
    path = ".".join(str(part) for part in entry["loc"]) or "settings"
    return f"{path}: {entry['msg']}"


def _fail(settings_class: type[ProcessSettings], lines: list[str]) -> NoReturn:
    text = "".join(f"  {line}\n" for line in lines)
    sys.stderr.write(f"{_program(settings_class)}: {len(lines)} wrong setting(s):\n{text}--help lists all settings\n")
    raise SystemExit(2)
