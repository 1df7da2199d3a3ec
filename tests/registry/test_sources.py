"""What sources are called, and what is read of them: the parts without a network."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from helios.mesh.errors import HeliosError, InvalidRequest
from helios.mesh.settings import load_settings
from helios.registry.model_card import read_license
from helios.registry.settings import RegistrySettings
from helios.registry.sources.architectures import check_architecture, known_architectures
from helios.registry.sources.gguf import choose_gguf
from helios.registry.sources.http_directory import parse_sums
from helios.registry.sources.hugging_face import read_token
from helios.registry.sources.oci import read_layers
from helios.registry.sources.patterns import Selection
from helios.registry.sources.reference import (
    HubReference,
    OciReference,
    UrlReference,
    parse_reference,
    place_of,
    suggest_name,
)
from helios.registry.sources.remote import RemoteFile, fingerprint, git_blob_sha1
from helios.registry.sources.settings import HuggingFaceSettings, SourceSettings
from helios.registry.sources.web import origin, redirected, without_credentials
from tests.registry import tiny
from tests.registry.support import Parts

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "expected", "name"),
    [
        ("hf:org/Model-1.5_b", HubReference("hf", "org/Model-1.5_b"), "Model-1.5_b"),
        ("hf:gpt2@refs/pr/1", HubReference("hf", "gpt2", "refs/pr/1"), "gpt2"),
        ("ms:org/m@v1", HubReference("ms", "org/m", "v1"), "m"),
        ("s3://bucket/some/prefix/", UrlReference("s3", "s3://bucket/some/prefix"), "prefix"),
        ("gs://bucket", UrlReference("gs", "gs://bucket"), "bucket"),
        ("https://host:8443/a/m", UrlReference("https", "https://host:8443/a/m"), "m"),
        ("oci://localhost:5000/a/m:v1", OciReference("localhost:5000", "a/m", "v1"), "m"),
        (f"oci://host/m@sha256:{HEX}", OciReference("host", "m", digest=f"sha256:{HEX}"), "m"),
        ("/models/my-model", None, "my-model"),
        ("/models/x.gguf", None, "x"),
        ("embedded:smollm2", None, "smollm2"),
    ],
)
def test_a_source_is_what_it_says(text: str, expected: object, name: str) -> None:
    assert parse_reference(text) == expected
    assert suggest_name(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "hf:", "hf:a/b/c", "hf:../b", "hf:a--b/c", "hf:a/b@", "hf:a/b@x y", "hf:a/b@../c", "hf://a/b", "ms:-a/b",
        "https://", "https://user:pw@host/x", "https://host/x?token=1", "https://host/a/../b", "s3://b/ü",
        "https://host:99999/x", "oci:host/m", "oci://host", "oci://host/M", f"oci://host/m@sha256:{HEX[:-1]}",
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused_in_words(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_reference(text)
    assert caught.value.reason == "INVALID_SOURCE"
    assert "pw" not in caught.value.message


@given(st.text(max_size=60))
def test_a_reference_reads_as_it_is_written(text: str) -> None:
    for scheme in ("hf:", "ms:", "oci://", "s3://", "https://", ""):
        try:
            reference = parse_reference(scheme + text)
        except InvalidRequest:
            continue
        if reference is not None:
            assert parse_reference(str(reference)) in (reference, _tagged(reference))


def _tagged(reference: object) -> object:
    # A tag beside a digest says nothing more; a manifest without either is the latest.
    if isinstance(reference, OciReference):
        if reference.digest:
            return OciReference(reference.host, reference.repository, digest=reference.digest)
        return OciReference(reference.host, reference.repository, reference.wanted)
    return reference


async def test_patterns_choose_among_a_directorys_files(parts: Parts, tmp_path: Path) -> None:
    source = tiny.write_sharded(tmp_path / "model")
    whole = (await parts.ingest("whole", source)).model.revision
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    assert (await parts.ingest("m", source)).model.revision.digest != whole.digest
    assert (await parts.ingest("m", source, exclude=("*.md",))).model.revision.digest == whole.digest
    with pytest.raises(InvalidRequest) as refused:
        await parts.ingest("m", source, include=("none/*",))
    assert refused.value.reason == "INVALID_PATTERN"
    with pytest.raises(InvalidRequest) as refused:
        await parts.ingest("m", "embedded:smollm2-135m-instruct", include=("*",))
    assert refused.value.reason == "INVALID_PATTERN"


def test_patterns_choose_as_the_hubs_client_does() -> None:
    everything = Selection()
    assert everything.takes("a/b.json")
    chosen = Selection(("*.json", "onnx/"), ("secret*",))
    taken = [path for path in ("x.json", "a/x.json", "onnx/m.bin", "m.bin", "secret.json") if chosen.takes(path)]
    assert taken == ["x.json", "a/x.json", "onnx/m.bin"]
    for patterns in (("",), ("a\n",), ("*" * 300,), ("*",) * 65):
        with pytest.raises(InvalidRequest) as caught:
            Selection(exclude=patterns).check()
        assert caught.value.reason == "INVALID_PATTERN"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (b"---\nlicense: apache-2.0\n---\ntext", "apache-2.0"),
        (b"---\r\ntags:\r\n- x\r\nlicense: 'mit'  # yes\r\n---\r\n", "mit"),
        (b"---\nlicense: other\nlicense_name: llama3.1\n---\n", "llama3.1"),
        (b"---\nlicense: other\n---\n", "other"),
        (b"---\nmodel:\n  license: mit\n---\n", ""),
        (b"---\nlicense:\n- mit\n- gpl\n---\n", ""),
        (b"---\nlicense: &a [*a]\n---\n", ""),
        (b"# no metadata\nlicense: mit\n", ""),
        (b"---\nnever ends\nlicense: mit\n", ""),
        (b"\xff\xfe", ""),
    ],
)
def test_a_cards_licence_is_read_or_left_unsaid(card: bytes, expected: str) -> None:
    assert read_license(card) == expected


def test_sums_are_read_as_sha256sum_writes_them() -> None:
    assert parse_sums(f"{HEX}  a.json\n{HEX.upper()} *./b c\n\n{HEX}  SHA256SUMS\n".encode()) == {
        "a.json": HEX,
        "b c": HEX,
    }
    for wrong in (b"", b"abc  x\n", b"<html>"):
        with pytest.raises(InvalidRequest):
            parse_sums(wrong)


def layer(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "mediaType": "application/vnd.cncf.model.weight.v1.raw",
        "digest": f"sha256:{HEX}",
        "size": 5,
        "annotations": {"org.cncf.model.filepath": "m.safetensors"},
    }
    return base | changes


def manifest(*layers: object, **changes: object) -> dict[str, object]:
    return {"artifactType": "application/vnd.cncf.model.manifest.v1+json", "layers": list(layers)} | changes


def test_a_models_manifest_is_its_files() -> None:
    assert read_layers(manifest(layer()), "oci://h/m") == [("m.safetensors", f"sha256:{HEX}", 5, "")]
    packed = layer(mediaType="application/vnd.cncf.model.weight.v1.tar+gzip")
    assert read_layers(manifest(packed), "oci://h/m") == [("m.safetensors", f"sha256:{HEX}", 5, "tar+gzip")]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"layers": [], "config": {"mediaType": "application/vnd.oci.image.config.v1+json"}}, "not a model"),
        ({"manifests": []}, "no manifest of one model"),
        ([], "no manifest of one model"),
        (manifest(layer(mediaType="application/vnd.cncf.model.weight.v1.tar+brotli")), "nothing here unpacks"),
        (manifest(layer(mediaType="application/vnd.oci.image.layer.v1.tar")), "no file by CNCF ModelPack"),
        (manifest(layer(annotations={})), "no file by CNCF ModelPack"),
        (manifest(layer(digest=f"sha512:{HEX}")), "no file by CNCF ModelPack"),
        (manifest(7), "no file by CNCF ModelPack"),
    ],
)
def test_what_is_no_model_is_refused_in_words(document: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_layers(document, "oci://h/m")


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a\\b", "a\nb", ""])
def test_a_listed_path_can_not_leave_its_directory(path: str) -> None:
    with pytest.raises(HeliosError):
        RemoteFile(path, 1, "place")


def test_a_git_blob_has_the_name_that_git_gives_it() -> None:
    # `git hash-object` of an empty file, and of "hello\n".
    assert git_blob_sha1(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_blob_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_a_listing_is_known_again_only_if_all_of_it_is() -> None:
    one, two = RemoteFile("a", 1, "x", sha256=HEX), RemoteFile("b", 1, "y", git_sha1="0" * 40)
    assert fingerprint((one, two)) == fingerprint((two, one)) != ""
    assert fingerprint((one, RemoteFile("b", 2, "y", git_sha1="0" * 40))) != fingerprint((one, two))
    assert fingerprint((one, RemoteFile("b", 1, "y"))) == ""
    assert fingerprint(()) == ""


def test_credentials_stay_with_their_origin() -> None:
    assert origin("https://h/x") == origin("https://h:443/y") != origin("http://h/x")
    assert without_credentials({"Authorization": "x", "range": "r"}) == {"range": "r"}
    assert redirected("https://h/a/b", "../c") == "https://h/c"
    for target in ("http://h/x", "file:///etc/passwd", "ftp://h/x"):
        with pytest.raises(HeliosError):
            redirected("https://h/x", target)


@dataclass
class Case:
    config: dict[str, object]
    words: str


@pytest.mark.parametrize(
    "case",
    [
        Case({"architectures": ["LlamaForCausalLN"]}, "it knows LlamaForCausalLM"),
        Case({"architectures": ["Mine"], "auto_map": {"AutoModel": "x.Mine"}}, "Python code in its repository"),
        Case({}, "does not say which architecture"),
    ],
)
def test_an_unknown_architecture_is_refused_in_words(case: Case) -> None:
    with pytest.raises(InvalidRequest, match=case.words):
        check_architecture(case.config, "hf:org/m", is_any=False)


def test_the_engines_list_holds_the_common_ones() -> None:
    common = {"LlamaForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM", "BertModel", "Gemma3ForCausalLM"}
    assert common <= known_architectures()
    check_architecture(json.loads('{"architectures": ["LlamaForCausalLM"]}'), "hf:org/m", is_any=False)


def test_one_setting_of_a_hub_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HELIOS_REGISTRY__SOURCES__HUGGING_FACE__TOKEN", "hf_secret")
    monkeypatch.setenv("HELIOS_REGISTRY__SOURCES__OCI__CREDENTIALS", '{"h:5000": "user:pw"}')
    settings = load_settings(RegistrySettings, [f"--state-directory={tmp_path}", "--mesh.tls=off"])
    assert settings.sources.hugging_face.endpoint == "https://huggingface.co"
    assert read_token(settings.sources.hugging_face) == "hf_secret"
    shown = json.dumps(settings.model_dump(mode="json"), default=str)
    assert "hf_secret" not in shown
    assert "pw" not in shown


def test_a_token_file_is_read_anew_and_need_not_be_there(tmp_path: Path) -> None:
    settings = HuggingFaceSettings(token_file=tmp_path / "token")
    assert read_token(settings) == ""
    settings.token_file.write_text("hf_one\n")  # type: ignore[union-attr]
    assert read_token(settings) == "hf_one"


def test_hubs_own_variables_are_tokens_unless_one_is_set() -> None:
    environment = {"HF_TOKEN": "hf_env\n", "MODELSCOPE_API_TOKEN": "ms_env"}
    found = SourceSettings().with_environment(environment)
    assert read_token(found.hugging_face) == "hf_env"
    assert read_token(found.modelscope) == "ms_env"
    assert "hf_env" not in repr(found)
    set_before = SourceSettings(hugging_face=HuggingFaceSettings(token=SecretStr("hf_set")))
    assert read_token(set_before.with_environment(environment).hugging_face) == "hf_set"
    assert SourceSettings().with_environment({}) == SourceSettings()


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("hf:org/m@abc", "hf:Org/m", True),
        ("hf:org/m", "ms:org/m", False),
        ("hf:a/m", "hf:b/m", False),
        ("oci://h/m@sha256:" + "0" * 64, "oci://h/m:v1", True),
        ("s3://b/p/", "s3://b/p", True),
        ("dir:/models/m", "/models/m", True),
        ("gguf:/models/m.gguf", "/models/n.gguf", False),
        ("embedded:x", "embedded:x", True),
    ],
)
def test_a_new_revision_comes_from_the_same_place(one: str, other: str, is_same: bool) -> None:
    assert (place_of(one) == place_of(other)) is is_same


def test_of_gguf_files_one_is_the_model() -> None:
    assert choose_gguf({"m-Q4.gguf": 1, "mmproj-m.gguf": 2}, "here", "name it") == "m-Q4.gguf"
    with pytest.raises(InvalidRequest, match="2 GGUF files; name it: ") as many:
        choose_gguf({"a/m-Q4.gguf": 1_500_000_000, "m-Q8.gguf": 3_000_000_000}, "here", "name it")
    assert many.value.message.endswith("a/m-Q4.gguf (1.5 GB), m-Q8.gguf (3.0 GB)")
    assert many.value.reason == "AMBIGUOUS_SOURCE"
    with pytest.raises(InvalidRequest, match="one of 2 pieces") as split:
        choose_gguf({f"m-0000{n}-of-00002.gguf": 1 for n in (1, 2)}, "here", "name it")
    assert split.value.reason == "UNSUPPORTED_FORMAT"
