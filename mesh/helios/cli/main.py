"""The command line: ``helios --help``."""

import asyncio
import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeAlias, TypeVar

import grpc.aio
import typer
from rich.console import Console
from rich.text import Text

from helios.cli import cache as cache_commands
from helios.cli import commands, keys, model_versions
from helios.cli import models_follow as following
from helios.cli import models_rollout as rollouts
from helios.cli import usage as usages
from helios.cli import why as explanations
from helios.cli.models_add import Addition
from helios.cli.models_add import models_add as models_add_command
from helios.cli.models_gc import CollectOptions
from helios.cli.models_gc import models_gc as models_gc_command
from helios.cli.models_push import models_push as models_push_command
from helios.cli.models_set import models_set as models_set_command
from helios.cli.state import StateDirectory
from helios.cli.topology import EMBEDDED_MODEL, default_state_directory
from helios.cli.up import UpOptions
from helios.mesh.errors import HeliosError
from helios.mesh.status import error_from_rpc
from helios.registry.client import KeySpec

T = TypeVar("T")

app: Final = typer.Typer(
    name="helios",
    help="Serverless LLM inference: many models behind one OpenAI-compatible address.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
models: Final = typer.Typer(help="Models that the mesh knows.", no_args_is_help=True)
app.add_typer(models, name="models")
cache: Final = typer.Typer(help="What this node's storage agent has.", no_args_is_help=True)
app.add_typer(cache, name="cache")

keys_app: Final = typer.Typer(help="API keys of clients.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

console: Final = Console()
errors: Final = Console(stderr=True)

StateOption = Annotated[
    Path,
    typer.Option(
        "--state-dir",
        envvar="HELIOS_STATE_DIR",
        help="Directory of the mesh: certificates, models, logs, sockets.",
        show_default="$XDG_STATE_HOME/helios",
        default_factory=default_state_directory,
    ),
]
SettingOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Engine setting, such as max_context_tokens=4096. May be repeated."),
]
AliasOption = Annotated[
    list[str] | None, typer.Option(help="Another name for it, which no other model may have. May be repeated.")
]
Sha256Option = Annotated[
    str, typer.Option(help="What it must be: the sha256 of a .gguf file, or the revision that other sources make.")
]
TagOption = Annotated[
    list[str] | None, typer.Option(help="Tag to point at the revision; MODEL@TAG reaches it. May be repeated.")
]
KeepServedOption = Annotated[
    bool,
    typer.Option("--keep-served", help="Go on serving the revision that the model serves; MODEL@TAG tries this one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def up(
    state_dir: StateOption,
    *,
    detach: Annotated[bool, typer.Option("--detach", help="Return once the mesh serves; it runs on.")] = False,
    host: Annotated[
        str, typer.Option(help="Address of the public listener; other than a loopback one, requests need API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the public listener.", min=1, max=65535)] = 8080,
    admin_port: Annotated[int, typer.Option(help="Port of the admin listener.", min=1, max=65535)] = 8081,
    model: Annotated[str, typer.Option(help="Model to have at hand; empty: none.")] = EMBEDDED_MODEL,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of a process, such as proxy.idle_timeout_seconds=60. May be repeated."),
    ] = None,
) -> None:
    """Run the whole mesh on this machine: registry, storage, worker, proxy and Envoy."""
    options = UpOptions(
        StateDirectory(state_dir.absolute()),
        host=host,
        port=port,
        admin_port=admin_port,
        model=model,
        overrides=tuple(setting or ()),
    )
    _run(commands.up_detached(options, console) if detach else commands.up(options, console))


@app.command()
def down(
    state_dir: StateOption,
    *,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds to wait until it is gone; it goes on stopping after that. Default: as long as it may take.",
            min=1,
        ),
    ] = None,
) -> None:
    """Stop the mesh: requests end first.

    They get 20 s, then each process has its own time to end before it is killed: 5 s Envoy, 15 s more than
    worker.replica.drain_seconds (30) the worker, 15 s the others. All in all 105 s at most, and usually two.
    """
    _run(commands.down(_state(state_dir), console, timeout_seconds=timeout))


@app.command()
def status(state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """Show processes, workers, models and replicas."""
    _run(commands.status(_state(state_dir), console, is_json=is_json))


@models.command("list")
def models_list(state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """List the models and their states."""
    _run(commands.models_list(_state(state_dir), console, is_json=is_json))


FollowOption: TypeAlias = Annotated[
    bool, typer.Option("--follow", help="Pull it again, as a new revision, whenever its source changes.")
]
IntervalOption: TypeAlias = Annotated[
    str, typer.Option(help="How often a followed source is looked at: 90s, 15m, 1h, 7d. Default: 1h.")
]
PolicyOption: TypeAlias = Annotated[
    str,
    typer.Option(
        help="What a followed source's new revision does: keep (only MODEL@next reaches it), move (it is served), "
        "rollout (it gets --weight of the requests). Default: keep."
    ),
]
WeightOption: TypeAlias = Annotated[
    int | None, typer.Option(help="Of the policy rollout: the share that it begins with, in percent.", min=0, max=100)
]


@models.command("add")
def models_add(  # noqa: PLR0913 - one for each option
    name: Annotated[str, typer.Argument(help="Name that requests will use.")],
    path: Annotated[
        str, typer.Argument(help="Directory with safetensors, a .gguf file, embedded:NAME, or a source as pull has it.")
    ],
    state_dir: StateOption,
    *,
    alias: AliasOption = None,
    sha256: Sha256Option = "",
    setting: SettingOption = None,
    tag: TagOption = None,
    keep_served: KeepServedOption = False,
    follow: FollowOption = False,
    interval: IntervalOption = "",
    policy: PolicyOption = "",
    weight: WeightOption = None,
    is_json: JsonOption = False,
) -> None:
    """Add a model, or a new revision of one."""
    wanted = Addition(
        name,
        path,
        aliases=tuple(alias or ()),
        sha256=sha256,
        assignments=tuple(setting or ()),
        tags=tuple(tag or ()),
        keep_served=keep_served,
        follow=_manner(interval, policy, weight, is_following=follow),
    )
    _run(models_add_command(_state(state_dir), console, wanted, is_json=is_json))


@models.command("pull")
def models_pull(  # noqa: PLR0913 - one for each option
    source: Annotated[
        str,
        typer.Argument(
            help="hf:ORG/NAME, hf:ORG/NAME@REVISION, ms:ORG/NAME, https://HOST/DIRECTORY, s3://BUCKET/PREFIX, gs://…, "
            "az://…, oci://HOST/REPOSITORY:TAG, or what add takes."
        ),
    ],
    state_dir: StateOption,
    *,
    name: Annotated[
        str | None, typer.Option(help="Name that requests will use. Default: the last part of the source.")
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of a hub; tag of an OCI registry.")] = "",
    include: Annotated[
        list[str] | None, typer.Option(help="Only files that match, such as '*Q8_0.gguf'. May be repeated.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No files that match. May be repeated.")] = None,
    alias: AliasOption = None,
    sha256: Sha256Option = "",
    setting: SettingOption = None,
    tag: TagOption = None,
    keep_served: KeepServedOption = False,
    follow: FollowOption = False,
    interval: IntervalOption = "",
    policy: PolicyOption = "",
    weight: WeightOption = None,
    is_json: JsonOption = False,
) -> None:
    """Download a model and add it: verified, resumed where an earlier try stopped, and only what is not here yet."""
    wanted = Addition(
        name,
        source,
        revision,
        aliases=tuple(alias or ()),
        sha256=sha256,
        assignments=tuple(setting or ()),
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        tags=tuple(tag or ()),
        keep_served=keep_served,
        follow=_manner(interval, policy, weight, is_following=follow),
    )
    _run(models_add_command(_state(state_dir), console, wanted, is_json=is_json))


@models.command("follow")
def models_follow(  # noqa: PLR0913 - one for each option
    model: Annotated[str, typer.Argument(help="Name or alias.")],
    state_dir: StateOption,
    *,
    source: Annotated[str, typer.Option(help="Follow this source, as pull takes it.")] = "",
    interval: IntervalOption = "",
    policy: PolicyOption = "",
    weight: WeightOption = None,
    now: Annotated[bool, typer.Option("--now", help="Have the source looked at now.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Follow it no more; revisions and tags stay.")] = False,
    is_json: JsonOption = False,
) -> None:
    """Follow a model's source: what changes there becomes a new revision. With no option, show how that went."""
    manner = following.Manner(interval, policy, weight)
    order = following.Order(source, manner, is_stopped=stop, is_now=now)
    _run(following.follow(_state(state_dir), console, model, order, is_json=is_json))


@models.command("push")
def models_push(
    model: Annotated[str, typer.Argument(help="Which revision: MODEL, MODEL@TAG, or MODEL@1f0c22 by its digest.")],
    target: Annotated[str, typer.Argument(help="oci://HOST/REPOSITORY:TAG; without a TAG it is latest.")],
    state_dir: StateOption,
    *,
    is_json: JsonOption = False,
) -> None:
    """Push a model to an OCI registry, by CNCF ModelPack: only what is not there yet; pulled, it has the same digest.

    The registry's process logs in: with what docker login wrote, or the setting registry.sources.oci.credentials.
    """
    _run(models_push_command(_state(state_dir), console, model, target, is_json=is_json))


@models.command("set")
def models_set(
    name: Annotated[str, typer.Argument(help="Name or alias.")],
    state_dir: StateOption,
    *,
    setting: SettingOption = None,
    unset: Annotated[list[str] | None, typer.Option(help="Setting to take back. May be repeated.")] = None,
) -> None:
    """Change how a model's engine is set; without options, show the settings and what can be set."""
    _run(models_set_command(_state(state_dir), console, name, tuple(setting or ()), tuple(unset or ())))


@models.command("tag")
def models_tag(
    model: Annotated[str, typer.Argument(help="Which revision: MODEL@1f0c22 by its digest, MODEL@TAG, or MODEL.")],
    tag: Annotated[
        str, typer.Argument(help="The tag: requests for MODEL@TAG reach the revision. With --serve: none.")
    ] = "",
    *,
    state_dir: StateOption,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the revision: requests for MODEL reach it.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the tag; the revision stays.")] = False,
    is_json: JsonOption = False,
) -> None:
    """Point a tag at a revision of a model, or serve that revision; the change is at once for everybody."""
    if bool(tag) == serve or (serve and delete):
        raise typer.BadParameter("give a TAG, or --serve without one")
    _run(model_versions.tag(_state(state_dir), console, model, tag, is_deleted=delete, is_json=is_json))


@models.command("rollback")
def models_rollback(
    model: Annotated[str, typer.Argument(help="What to roll back: MODEL for what it serves, or MODEL@TAG.")],
    state_dir: StateOption,
    *,
    to: Annotated[
        str, typer.Option(help="Digest, or its beginning, of an earlier revision; else the one before.")
    ] = "",
    is_json: JsonOption = False,
) -> None:
    """Go back to the revision that a model or a tag had before; doing it twice goes back two."""
    _run(model_versions.rollback(_state(state_dir), console, model, to=to, is_json=is_json))


@models.command("history")
def models_history(
    model: Annotated[str, typer.Argument(help="MODEL for everything, or MODEL@TAG for one tag.")],
    state_dir: StateOption,
    *,
    count: Annotated[int, typer.Option("--count", "-n", help="How many, the newest.", min=1, max=1000)] = 20,
    is_json: JsonOption = False,
) -> None:
    """List which revisions a model has served and its tags have named, and why."""
    _run(model_versions.history(_state(state_dir), console, model, count=count, is_json=is_json))


@models.command("rollout")
def models_rollout(
    model: Annotated[str, typer.Argument(help="Name or alias.")],
    state_dir: StateOption,
    *,
    to: Annotated[str, typer.Option(help="The canary: a tag of the model, or a revision's digest or its start.")] = "",
    weight: Annotated[
        int | None, typer.Option(help="Share of the requests for the canary, in percent.", min=0, max=100)
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Serve the canary: all requests go there.")] = False,
    abort: Annotated[bool, typer.Option("--abort", help="All requests go to what is served.")] = False,
    is_json: JsonOption = False,
) -> None:
    """Send a share of a model's requests to another revision of it; with no option, show what was done.

    A canary that does not answer hurts nobody: while it has no replica, its share goes to what is served.
    """
    change = rollouts.Change(to, weight, is_promoted=promote, is_aborted=abort)
    _run(rollouts.rollout(_state(state_dir), console, model, change, is_json=is_json))


@models.command("pin")
def models_pin(
    model: Annotated[str, typer.Argument(help="Which revision: MODEL@1f0c22 by its digest, MODEL@TAG, or MODEL.")],
    state_dir: StateOption,
    *,
    reason: Annotated[str, typer.Option(help="Why, for others.")] = "",
    remove: Annotated[bool, typer.Option("--remove", help="Take the pin back.")] = False,
    is_json: JsonOption = False,
) -> None:
    """Keep a revision, and its model, from being removed."""
    _run(model_versions.pin(_state(state_dir), console, model, reason=reason, is_removed=remove, is_json=is_json))


@models.command("rm")
def models_rm(
    name: Annotated[str, typer.Argument(help="Name of the model; MODEL@1f0c22 removes that revision only.")],
    state_dir: StateOption,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also one that is pinned, or that another model's settings name.")
    ] = False,
    is_json: JsonOption = False,
) -> None:
    """Remove a model, its replicas and its bytes, or one revision that nothing points at."""
    _run(model_versions.remove(_state(state_dir), console, name, is_forced=force, is_json=is_json))


@models.command("gc")
def models_gc(
    state_dir: StateOption,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    grace: Annotated[
        float | None, typer.Option(help="Keep what is younger than this many seconds.", show_default="the registry's")
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Remove blobs that no model and no artifact uses, and unfinished uploads."""
    options = CollectOptions(is_dry_run=dry_run, grace_seconds=grace, is_json=is_json)
    _run(models_gc_command(_state(state_dir), console, options))


@models.command("show")
def models_show(
    name: Annotated[str, typer.Argument(help="Name or alias; MODEL@TAG for a tag's revision.")],
    state_dir: StateOption,
    *,
    is_json: JsonOption = False,
) -> None:
    """Show one model: state, revision, resources, tags."""
    _run(commands.models_show(_state(state_dir), console, name, is_json=is_json))


@keys_app.command("create")
def keys_create(  # noqa: PLR0913 - one for each option
    name: Annotated[str, typer.Argument(help="Name of the key: lower-case letters, digits and hyphens.")],
    state_dir: StateOption,
    *,
    tenant: Annotated[str, typer.Option(help="Whose it is: keys of one tenant share its place in queues.")] = "",
    model: Annotated[
        list[str] | None, typer.Option(help="Model that it may use, such as 'smol*'. May be repeated. Default: all.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests a minute; 0: no limit.", min=0, max=2**32 - 1)] = 0,
    tokens: Annotated[
        int, typer.Option(help="Tokens a minute, of prompts and answers; 0: no limit.", min=0, max=2**32 - 1)
    ] = 0,
    priority: Annotated[str, typer.Option(help="Who goes first where there is a queue: low, normal, high.")] = "normal",
    weight: Annotated[int, typer.Option(help="The tenant's share of a busy model.", min=1, max=1000)] = 1,
    expires: Annotated[str, typer.Option(help="When it ends, from now: 90s, 15m, 12h, 30d. Default: never.")] = "",
    is_json: JsonOption = False,
) -> None:
    """Make an API key and print it; it is not shown again."""

    async def make() -> None:
        spec = KeySpec(
            name,
            tenant,
            tuple(model or ()),
            requests_per_minute=requests,
            tokens_per_minute=tokens,
            priority=keys.priority_of(priority),
            weight=weight,
            ttl=keys.duration_of(expires),
        )
        await keys.create(_state(state_dir), console, spec, is_json=is_json)

    _run(make())


@keys_app.command("list")
def keys_list(
    state_dir: StateOption,
    *,
    show_ended: Annotated[bool, typer.Option("--all", help="Also those that are revoked or expired.")] = False,
    is_json: JsonOption = False,
) -> None:
    """List the API keys."""
    _run(keys.list_keys(_state(state_dir), console, show_ended=show_ended, is_json=is_json))


@keys_app.command("revoke")
def keys_revoke(
    key: Annotated[str, typer.Argument(help="Name or id of the key.")],
    state_dir: StateOption,
    *,
    is_json: JsonOption = False,
) -> None:
    """End an API key, everywhere, within a second."""
    _run(keys.revoke(_state(state_dir), console, key, is_json=is_json))


@models.command("usage")
def models_usage(
    state_dir: StateOption,
    name: Annotated[str, typer.Argument(help="Name or alias; empty: all models, a line each.")] = "",
    *,
    hours: Annotated[int, typer.Option(help="How many hours, the one that runs included.", min=1, max=8784)] = 24,
    is_json: JsonOption = False,
) -> None:
    """Show how much models are used, what is expected of them, and how right that was."""
    _run(usages.usage(_state(state_dir), console, name, hour_count=hours, is_json=is_json))


RevisionArgument = Annotated[str, typer.Argument(help="Name or alias of a model, or a revision's sha256:DIGEST.")]


@cache.command("status")
def cache_status(state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """Show the tiers, what they did, and the revisions in them."""
    _run(cache_commands.status(_state(state_dir), console, is_json=is_json))


@cache.command("evict")
def cache_evict(revision: RevisionArgument, state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """Drop a revision that nobody uses from this node; `helios evict` stops a model's replicas first."""
    _run(cache_commands.evict(_state(state_dir), console, revision, is_json=is_json))


@cache.command("pin")
def cache_pin(revision: RevisionArgument, state_dir: StateOption) -> None:
    """Have a revision stay on this node once it is here."""
    _run(cache_commands.pin(_state(state_dir), console, revision, is_pinned=True))


@cache.command("unpin")
def cache_unpin(revision: RevisionArgument, state_dir: StateOption) -> None:
    """Let a pinned revision be evicted again."""
    _run(cache_commands.pin(_state(state_dir), console, revision, is_pinned=False))


@cache.command("scrub")
def cache_scrub(
    state_dir: StateOption,
    *,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Most bytes to read in a second. Default: no limit.", min=1)
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Read every blob from the disk and compare it with its name; mend or drop what is bad.

    Exits with 1 where something was.
    """
    _run(cache_commands.scrub(_state(state_dir), console, bytes_per_second=limit, is_json=is_json))


@app.command()
def chat(
    state_dir: StateOption,
    model: Annotated[str, typer.Argument(help="Name or alias.")] = "",
    *,
    message: Annotated[str, typer.Option("--message", "-m", help="Ask this, print the answer, and leave.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.", min=1)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; unset: the model's own default.", min=0)
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="HELIOS_API_KEY", help="API key, where the mesh requires one.", show_envvar=True)
    ] = "",
) -> None:
    """Talk to a model; answers stream."""
    turns = commands.Turns(message, max_tokens=max_tokens, temperature=temperature, api_key=api_key)
    _run(commands.chat(_state(state_dir), console, model, turns))


@app.command()
def scale(
    model: Annotated[str, typer.Argument(help="Name or alias.")],
    count: Annotated[int, typer.Argument(help="Replicas to keep; 0: none until a request comes.", min=0, max=1000)],
    state_dir: StateOption,
) -> None:
    """Set how many replicas a model has."""
    _run(commands.scale(_state(state_dir), console, model, count))


@app.command()
def evict(model: Annotated[str, typer.Argument(help="Name or alias.")], state_dir: StateOption) -> None:
    """Stop a model's replicas and drop its weights from this node's cache."""
    _run(commands.evict(_state(state_dir), console, model))


@app.command()
def why(
    state_dir: StateOption,
    request: Annotated[
        str, typer.Argument(help="The answer's x-request-id; with --last: a model, or nothing for any.")
    ] = "",
    *,
    last: Annotated[bool, typer.Option("--last", help="The last request that came.")] = False,
    is_json: JsonOption = False,
) -> None:
    """Show where a request's time went, and why."""
    _run(explanations.why(_state(state_dir), console, request, is_last=last, is_json=is_json))


@app.command()
def requests(
    state_dir: StateOption,
    *,
    model: Annotated[str, typer.Option(help="Only those for this model, by name or alias.")] = "",
    status: Annotated[str, typer.Option(help="Only held, sent, running, finished, refused or left ones.")] = "",
    count: Annotated[int, typer.Option("--count", "-n", help="How many, the newest.", min=1, max=1000)] = 20,
    is_json: JsonOption = False,
) -> None:
    """List the last requests, for helios why."""
    state = _state(state_dir)
    _run(explanations.requests(state, console, model=model, status=status, count=count, is_json=is_json))


@app.command()
def stage(model: Annotated[str, typer.Argument(help="Name or alias.")], state_dir: StateOption) -> None:
    """Keep a model's weights in memory without a process: its next start reads no disk."""
    _run(commands.stage(_state(state_dir), console, model))


@app.command()
def unstage(model: Annotated[str, typer.Argument(help="Name or alias.")], state_dir: StateOption) -> None:
    """Give the memory of a staged model back; the disk keeps its weights."""
    _run(commands.unstage(_state(state_dir), console, model))


@app.command("sleep")
def sleep_replica(
    replica: Annotated[str, typer.Argument(help="Id of a replica; `helios status` lists them.")], state_dir: StateOption
) -> None:
    """Take an idle replica off its GPU; the next request of its model wakes it."""
    _run(commands.sleep_replica(_state(state_dir), console, replica))


@app.command("wake")
def wake_replica(
    replica: Annotated[str, typer.Argument(help="Id of a replica; `helios status` lists them.")], state_dir: StateOption
) -> None:
    """Bring a sleeping replica back."""
    _run(commands.wake_replica(_state(state_dir), console, replica))


@app.command()
def logs(
    state_dir: StateOption,
    process: Annotated[str, typer.Argument(help="registry, storage, worker, proxy, envoy or up; empty: all.")] = "",
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="Lines of each log.", min=0)] = 20,
) -> None:
    """Print the logs of the processes."""
    _run(commands.logs(_state(state_dir), console, process, is_following=follow, line_count=lines))


def _manner(interval: str, policy: str, weight: int | None, *, is_following: bool) -> following.Manner | None:
    manner = following.Manner(interval, policy, weight)
    if not is_following and manner != following.Manner():
        raise typer.BadParameter("--interval, --policy and --weight go with --follow")
    return manner if is_following else None


def _state(path: Path) -> StateDirectory:
    return StateDirectory(path.absolute())


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(work)
    except HeliosError as error:
        _fail(error)
    except grpc.aio.AioRpcError as error:
        _fail(error_from_rpc(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(error: HeliosError) -> NoReturn:
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": {"reason": error.reason, "message": error.message}}) + "\n")
    else:
        # Messages name settings, packages and what engines said: "vllm[audio]" is no markup.
        told = Text.assemble(("error", "bold red"), f" {error.message} ", (f"({error.reason})", "dim"))
        errors.print(told, soft_wrap=True)
    raise typer.Exit(1)
