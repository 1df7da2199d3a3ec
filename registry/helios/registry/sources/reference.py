"""The grammar of sources that are reached by a network.

    hf:ORGANISATION/NAME[@REVISION]              Hugging Face hub, or whatever endpoint is set for it
    ms:ORGANISATION/NAME[@REVISION]              ModelScope
    s3://BUCKET/PREFIX  gs://…  az://…           an object store's prefix
    https://HOST/PATH                            a directory of a web server; here and above with one .gguf file: that
    oci://HOST/REPOSITORY[:TAG | @sha256:HEX]    an OCI registry, by CNCF ModelPack

What a person writes ends in URLs, messages and the database, so the alphabets are small and nothing is guessed.
"""

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from helios.mesh.errors import InvalidRequest

# The hub's own rule: parts of letters, digits, '-', '_' and '.', none of which begins or ends with '-' or '.'.
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9_](?:[\w.-]{0,94}\w)?(?:/\w(?:[\w.-]{0,94}\w)?)?", re.ASCII)
_GIT_REVISION: Final = re.compile(r"[A-Za-z0-9_][\w./+-]{0,254}", re.ASCII)
_OCI: Final = re.compile(
    r"(?P<host>[a-z0-9.-]+(?::\d{1,5})?)/(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
STORE_SCHEMES: Final = ("s3", "gs", "az")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository of a hub. ``revision`` is a branch, tag or commit; empty: the hub's default branch."""

    scheme: str
    repository: str
    revision: str = ""

    def __str__(self) -> str:
        """Returns the text that names it."""
        return f"{self.scheme}:{self.repository}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class UrlReference:
    """A directory of a web server, or a prefix of an object store; or one GGUF file there. ``url`` has no ``/`` at its
    end.
    """

    scheme: str
    url: str

    @property
    def directory(self) -> str:
        """The directory or prefix; of a file the one that it is in."""
        return self.url.rpartition("/")[0] if self.file else self.url

    @property
    def file(self) -> str:
        """The file's name as a URL has it; empty where none is named."""
        name = urlsplit(self.url).path.rpartition("/")[2]
        return name if name.lower().endswith(".gguf") else ""

    def __str__(self) -> str:
        """Returns the text that names it."""
        return self.url


@dataclass(frozen=True, slots=True)
class OciReference:
    """A manifest in an OCI registry. One of ``tag`` and ``digest`` may be empty."""

    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def wanted(self) -> str:
        """What is asked for: the digest, which can't change, before the tag."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        """Returns the text that names it."""
        separator = "@" if self.digest else ":"
        return f"oci://{self.host}/{self.repository}{separator}{self.wanted}"


Reference = HubReference | UrlReference | OciReference


def parse_reference(text: str) -> Reference | None:
    """Returns what a text names on a network; None where it has another form, such as a path's.

    Raises:
        InvalidRequest: INVALID_SOURCE, when it begins as one of these forms and goes on otherwise.
    """
    scheme, separator, rest = text.partition(":")
    if not separator:
        return None
    match scheme:
        case "hf" | "ms":
            return _parse_hub(scheme, rest)
        case "oci":
            return _parse_oci(rest)
        case "http" | "https" | "s3" | "gs" | "az":
            return _parse_url(scheme, text)
    return None


def suggest_name(text: str) -> str:
    """Returns the name that a model gets from its source where its user gives none: the last part of the path."""
    reference = parse_reference(text)
    path = text.removeprefix("embedded:").removesuffix(".gguf")
    if isinstance(reference, UrlReference):
        path = (urlsplit(reference.url).path or urlsplit(reference.url).netloc).removesuffix(".gguf")
    elif reference is not None:
        path = reference.repository
    return path.rstrip("/").rpartition("/")[2]


def place_of(text: str) -> str:
    """Returns where a source is, whichever revision of it: a new one of the same model has the same place."""
    reference = parse_reference(text)
    if isinstance(reference, HubReference):
        return f"{reference.scheme}:{reference.repository}".lower()
    if isinstance(reference, OciReference):
        return f"{reference.host}/{reference.repository}"
    if reference is not None:
        return reference.url
    kind, separator, path = text.partition(":")
    return path if separator and kind in {"dir", "gguf"} else text


def _parse_hub(scheme: str, rest: str) -> HubReference:
    repository, at, revision = rest.partition("@")
    if not _REPOSITORY.fullmatch(repository) or "--" in repository or ".." in repository:
        raise invalid_source(
            f"'{scheme}:{rest[:200]}' is not a repository: {scheme}:ORGANISATION/NAME, or with @REVISION a branch, tag"
            " or commit of it"
        )
    if at and (not _GIT_REVISION.fullmatch(revision) or ".." in revision):
        raise invalid_source(f"{revision[:200]!r} is not a revision: a branch, a tag or a commit")
    return HubReference(scheme, repository, revision)


def _parse_oci(rest: str) -> OciReference:
    found = _OCI.fullmatch(rest.removeprefix("//")) if rest.startswith("//") else None
    if found is None:
        raise invalid_source(
            f"'oci:{rest[:200]}' is not a manifest of an OCI registry: oci://HOST[:PORT]/REPOSITORY:TAG or @sha256:HEX"
        )
    return OciReference(found["host"], found["repository"], found["tag"] or "", found["digest"] or "")


def _parse_url(scheme: str, text: str) -> UrlReference:
    try:
        parts = urlsplit(text)
        is_sound = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_sound = False
        parts = urlsplit("")
    if not is_sound or not text.isascii() or " " in text:
        raise invalid_source(f"{text[:200]!r} is not a URL; write characters outside ASCII, and spaces, as %XX")
    if parts.username or parts.password:
        # It would be kept with the revision and shown to everybody.
        raise invalid_source("a source's URL holds no user and no password; set them for the registry (see README.md)")
    if parts.query or parts.fragment:
        raise invalid_source("a source's URL ends with its path: it has no '?' and no '#'")
    if ".." in parts.path.split("/"):
        raise invalid_source("a source's URL has no '..'")
    return UrlReference(scheme, text.rstrip("/"))


def invalid_source(message: str) -> InvalidRequest:
    """Returns the error of a source that can't be one."""
    return InvalidRequest(message, reason="INVALID_SOURCE", metadata={"param": "source"})
