"""Settings of the places that models are pulled from."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr

_HTTP = r"^https?://[^?#]+$"
# Of the environment, what is not for the programs that Docker's file names.
_OWN_NAMES = ("HELIOS_", "PG", "HF_TOKEN", "MODELSCOPE_API_TOKEN")
_CONFIG = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HubSettings(BaseModel):
    """One hub, and who the registry is to it."""

    model_config = _CONFIG

    endpoint: str = Field(pattern=_HTTP)
    """Base URL. Only this address gets the token; requests can't name another one."""
    token: SecretStr = SecretStr("")
    """Access token. Give it in the environment: flags are seen by every user of the machine. Empty: ``token_file``."""
    token_file: Path | None = None
    """File with a token, read anew at every pull. None, and a file that is not there: no token is sent."""


class HuggingFaceSettings(HubSettings):
    """The Hugging Face hub, or a service that speaks as it does."""

    endpoint: str = Field(default="https://huggingface.co", pattern=_HTTP)
    """Base URL; a mirror's, or a company's own. Only this address gets the token; requests can't name another one."""
    token_file: Path | None = Path("~/.cache/huggingface/token")
    """File with a token, read anew at every pull: where ``hf auth login`` writes one. One that is not there: none."""


class ModelScopeSettings(HubSettings):
    """ModelScope."""

    endpoint: str = Field(default="https://www.modelscope.cn", pattern=_HTTP)
    """Base URL; https://www.modelscope.ai is the one outside China."""


class StoreSettings(BaseModel):
    """How object stores are reached, by the names of obstore's configuration.

    Empty: as the cloud's own tools find it (environment, instance metadata).
    """

    model_config = _CONFIG

    s3: dict[str, SecretStr] = Field(default_factory=dict)
    """Such as ``endpoint``, ``region``, ``access_key_id``, ``secret_access_key``, ``skip_signature``."""
    gs: dict[str, SecretStr] = Field(default_factory=dict)
    """Such as ``service_account_path``, ``skip_signature``."""
    az: dict[str, SecretStr] = Field(default_factory=dict)
    """Such as ``account_name``, ``account_key``, ``endpoint``."""


class OciSettings(BaseModel):
    """OCI registries."""

    model_config = _CONFIG

    credentials: dict[str, SecretStr] = Field(default_factory=dict)
    """Host (with port, as the source has it) to ``user:password``. For others ``docker_config`` is looked into."""
    docker_config: Path | None = Path("~/.docker/config.json")
    """File with logins, read anew at every pull and push: where ``docker login`` writes them, or names the programs
    that keep them (``credHelpers``, ``credsStore``). None, and a file or host that is not there: registries are asked
    as anybody."""
    helper_seconds: float = Field(default=30.0, ge=0)
    """How long such a program may take; then it is killed, and the pull or push fails. 30: some ask a cloud for a
    token. 0: none is started."""
    helper_environment: dict[str, SecretStr] = Field(default_factory=dict)
    """The whole environment of such a program. Empty: the registry's own, without what is the registry's (``HELIOS_…``,
    ``PG…``)."""
    plain_http: list[str] = Field(default_factory=list)
    """Hosts that are spoken to without TLS. Loopback always is."""


class DownloadSettings(BaseModel):
    """How bytes are fetched."""

    model_config = _CONFIG

    in_flight: int = Field(default=32, ge=1, le=256)
    """Ranges that are fetched at a time, of all files together. 32: an object store gives each connection some 85 MB/s,
    and where there is no such limit more than 8 cost nothing (measured on two cores: 1.15 s for a GiB with any)."""
    files: int = Field(default=4, ge=1, le=16)
    """Files of a model that are fetched at a time, the smallest first; they share the ranges in flight. 4: while one
    begins or is synced, others move; each more takes a thread and no more bytes."""
    chunk_bytes: int = Field(default=8 << 20, ge=1 << 16, le=1 << 30)
    """One range, in bytes."""
    sync_bytes: int = Field(default=64 << 20, ge=1)
    """What a crash may cost: so many bytes are written before they are synced and noted as there."""
    bytes_per_second: int = Field(default=0, ge=0)
    """Bound of all downloads together. 0: none."""
    keep_seconds: float = Field(default=86_400.0, ge=0)
    """An unfinished download is kept this long, so that the next pull goes on where it stopped. A day: over a night."""


class SourceSettings(BaseModel):
    """Places that models are pulled from."""

    model_config = _CONFIG

    hugging_face: HuggingFaceSettings = Field(default_factory=HuggingFaceSettings)
    """``hf:``."""
    modelscope: ModelScopeSettings = Field(default_factory=ModelScopeSettings)
    """``ms:``."""
    stores: StoreSettings = Field(default_factory=StoreSettings)
    """``s3:``, ``gs:``, ``az:``."""
    oci: OciSettings = Field(default_factory=OciSettings)
    """``oci:``."""
    downloads: DownloadSettings = Field(default_factory=DownloadSettings)
    """How bytes are fetched."""

    def with_environment(self, environment: Mapping[str, str]) -> "SourceSettings":
        """Returns these settings with the tokens that the hubs' own clients take from the environment, and with what
        login helpers get of it.

        A token that is set goes before ``HF_TOKEN`` and ``MODELSCOPE_API_TOKEN``; those go before a file.
        """
        found = {}
        for field, name in (("hugging_face", "HF_TOKEN"), ("modelscope", "MODELSCOPE_API_TOKEN")):
            hub: HubSettings = getattr(self, field)
            token = environment.get(name, "").strip()
            if token and not hub.token.get_secret_value():
                found[field] = hub.model_copy(update={"token": SecretStr(token)})
        if not self.oci.helper_environment:
            theirs = {name: SecretStr(value) for name, value in environment.items() if not name.startswith(_OWN_NAMES)}
            return self.model_copy(update=found | {"oci": self.oci.model_copy(update={"helper_environment": theirs})})
        return self.model_copy(update=found)
