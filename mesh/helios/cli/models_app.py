"""``helios models``: options and help of its commands."""

from typing import Annotated, Final, TypeAlias

import typer

from helios.cli import commands, model_versions
from helios.cli import models_follow as following
from helios.cli import models_rollout as rollouts
from helios.cli import usage as usages
from helios.cli.models_add import Addition
from helios.cli.models_add import models_add as models_add_command
from helios.cli.models_durable import models_durable as models_durable_command
from helios.cli.models_gc import CollectOptions
from helios.cli.models_gc import models_gc as models_gc_command
from helios.cli.models_policy import PolicyChange
from helios.cli.models_policy import models_policy as models_policy_command
from helios.cli.models_profile import profile as models_profile_command
from helios.cli.models_push import models_push as models_push_command
from helios.cli.models_set import models_set as models_set_command
from helios.cli.models_watch import WatchOptions
from helios.cli.models_watch import models_watch as models_watch_command
from helios.cli.options import DryRunOption, JsonOption, StateOption, console, run, state_of

app: Final = typer.Typer(help="Models that the mesh knows.", no_args_is_help=True)

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


@app.command("list")
def models_list(state_dir: StateOption, *, is_json: JsonOption = False) -> None:
    """List the models and their states."""
    run(commands.models_list(state_of(state_dir), console, is_json=is_json))


@app.command("add")
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
    run(models_add_command(state_of(state_dir), console, wanted, is_json=is_json))


@app.command("pull")
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
    run(models_add_command(state_of(state_dir), console, wanted, is_json=is_json))


@app.command("follow")
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
    dry_run: DryRunOption = False,
    is_json: JsonOption = False,
) -> None:
    """Follow a model's source: what changes there becomes a new revision. With no option, show how that went."""
    manner = following.Manner(interval, policy, weight)
    order = following.Order(source, manner, is_stopped=stop, is_now=now, is_dry_run=dry_run)
    run(following.follow(state_of(state_dir), console, model, order, is_json=is_json))


@app.command("profile")
def models_profile(
    model: Annotated[str, typer.Argument(help="MODEL, MODEL@TAG, or MODEL@1f0c22 by its digest.")],
    state_dir: StateOption,
    *,
    plan: Annotated[
        bool, typer.Option("--plan", help="List its modules, and which may not be split; takes some seconds.")
    ] = False,
    is_json: JsonOption = False,
) -> None:
    """Show what a model needs: bytes by type and layer, ways to split it, devices it fits, what replicas held."""
    run(models_profile_command(state_of(state_dir), console, model, has_plan=plan, is_json=is_json))


@app.command("push")
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
    run(models_push_command(state_of(state_dir), console, model, target, is_json=is_json))


@app.command("set")
def models_set(
    name: Annotated[str, typer.Argument(help="Name or alias.")],
    state_dir: StateOption,
    *,
    setting: SettingOption = None,
    unset: Annotated[list[str] | None, typer.Option(help="Setting to take back. May be repeated.")] = None,
    dry_run: DryRunOption = False,
    is_json: JsonOption = False,
) -> None:
    """Change how a model's engine is set; without options, show the settings and what can be set."""
    changes = (tuple(setting or ()), tuple(unset or ()))
    run(models_set_command(state_of(state_dir), console, name, *changes, is_dry_run=dry_run, is_json=is_json))


@app.command("policy")
def models_policy(  # noqa: PLR0913 - one for each option
    name: Annotated[str, typer.Argument(help="Name or alias.")],
    state_dir: StateOption,
    *,
    least: Annotated[int | None, typer.Option("--min", help="Replicas to keep without requests.", min=0)] = None,
    most: Annotated[int | None, typer.Option("--max", help="Replicas at most; 0: what fits.", min=0)] = None,
    idle: Annotated[str, typer.Option(help="How long unused replicas stay ready: 15m; 0: for ever; usual.")] = "",
    asleep: Annotated[str, typer.Option(help="How long they sleep then, where they can; the same.")] = "",
    staged: Annotated[str, typer.Option(help="How long weights stay in memory then; the same.")] = "",
    window: Annotated[
        list[str] | None,
        typer.Option(
            help="Times with other bounds, in place of those that there are: 'CRON; SPAN; min=N; max=N; zone=NAME',"
            " such as '0 8 * * MON-FRI; 10h; min=2; zone=Europe/Berlin'. May be repeated; the last that is open counts."
        ),
    ] = None,
    has_no_windows: Annotated[bool, typer.Option("--no-windows", help="Take all windows away.")] = False,
    route: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="How one of its replicas is chosen, such as prefix_weight=0.6, kv_weight=0.5, choice=power_of_two or"
            " kept_for_high_ratio=0.25, where proxies are set otherwise; NAME=usual takes it back. May be repeated.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    is_json: JsonOption = False,
) -> None:
    """Say how many replicas a model has and when, how warm they are kept and which takes a request; or show it."""
    if window and has_no_windows:
        raise typer.BadParameter("--window and --no-windows contradict each other")
    change = PolicyChange(least, most, idle, asleep, staged, tuple(window or ()), has_no_windows, tuple(route or ()))
    run(models_policy_command(state_of(state_dir), console, name, change, is_dry_run=dry_run, is_json=is_json))


@app.command("durable")
def models_durable(
    name: Annotated[str, typer.Argument(help="Name or alias.")],
    state_dir: StateOption,
    *,
    durable: Annotated[
        bool | None,
        typer.Option(
            "--on/--off", help="Have its streams go on on another replica where theirs dies or drains; or not."
        ),
    ] = None,
    dry_run: DryRunOption = False,
    is_json: JsonOption = False,
) -> None:
    """Say whether a model's streams outlive their replicas; without an option, show what holds."""
    command = models_durable_command(
        state_of(state_dir), console, name, is_durable=durable, is_dry_run=dry_run, is_json=is_json
    )
    run(command)


@app.command("tag")
def models_tag(
    model: Annotated[str, typer.Argument(help="Which revision: MODEL@1f0c22 by its digest, MODEL@TAG, or MODEL.")],
    tag: Annotated[
        str, typer.Argument(help="The tag: requests for MODEL@TAG reach the revision. With --serve: none.")
    ] = "",
    *,
    state_dir: StateOption,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the revision: requests for MODEL reach it.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the tag; the revision stays.")] = False,
    dry_run: DryRunOption = False,
    is_json: JsonOption = False,
) -> None:
    """Point a tag at a revision of a model, or serve that revision; the change is at once for everybody."""
    if bool(tag) == serve or (serve and delete):
        raise typer.BadParameter("give a TAG, or --serve without one")
    command = model_versions.tag(
        state_of(state_dir), console, model, tag, is_deleted=delete, is_json=is_json, is_dry_run=dry_run
    )
    run(command)


@app.command("rollback")
def models_rollback(
    model: Annotated[str, typer.Argument(help="What to roll back: MODEL for what it serves, or MODEL@TAG.")],
    state_dir: StateOption,
    *,
    to: Annotated[
        str, typer.Option(help="Digest, or its beginning, of an earlier revision; else the one before.")
    ] = "",
    dry_run: DryRunOption = False,
    is_json: JsonOption = False,
) -> None:
    """Go back to the revision that a model or a tag had before; doing it twice goes back two."""
    run(model_versions.rollback(state_of(state_dir), console, model, to=to, is_json=is_json, is_dry_run=dry_run))


@app.command("history")
def models_history(
    model: Annotated[str, typer.Argument(help="MODEL for everything, or MODEL@TAG for one tag.")],
    state_dir: StateOption,
    *,
    count: Annotated[int, typer.Option("--count", "-n", help="How many, the newest.", min=1, max=1000)] = 20,
    is_json: JsonOption = False,
) -> None:
    """List which revisions a model has served and its tags have named, and why."""
    run(model_versions.history(state_of(state_dir), console, model, count=count, is_json=is_json))


@app.command("watch")
def models_watch(
    state_dir: StateOption,
    *,
    model: Annotated[str, typer.Option(help="Only changes of this model, by its name.")] = "",
    after: Annotated[
        int | None, typer.Option(help="Begin after this change; 0: with the oldest that is known.", min=0)
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", help="End after so many. 0: never.", min=0)] = 0,
    is_json: JsonOption = False,
) -> None:
    """Print each change of models as it comes: revisions, tags, aliases, pins, policies, and who made it."""
    run(models_watch_command(state_of(state_dir), console, WatchOptions(model, after, count, is_json)))


@app.command("rollout")
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
    dry_run: DryRunOption = False,
    is_json: JsonOption = False,
) -> None:
    """Send a share of a model's requests to another revision of it; with no option, show what was done.

    A canary that does not answer hurts nobody: while it has no replica, its share goes to what is served.
    """
    change = rollouts.Change(to, weight, is_promoted=promote, is_aborted=abort)
    run(rollouts.rollout(state_of(state_dir), console, model, change, is_json=is_json, is_dry_run=dry_run))


@app.command("pin")
def models_pin(
    model: Annotated[str, typer.Argument(help="Which revision: MODEL@1f0c22 by its digest, MODEL@TAG, or MODEL.")],
    state_dir: StateOption,
    *,
    reason: Annotated[str, typer.Option(help="Why, for others.")] = "",
    remove: Annotated[bool, typer.Option("--remove", help="Take the pin back.")] = False,
    dry_run: DryRunOption = False,
    is_json: JsonOption = False,
) -> None:
    """Keep a revision, and its model, from being removed."""
    command = model_versions.pin(
        state_of(state_dir), console, model, reason=reason, is_removed=remove, is_json=is_json, is_dry_run=dry_run
    )
    run(command)


@app.command("rm")
def models_rm(
    name: Annotated[str, typer.Argument(help="Name of the model; MODEL@1f0c22 removes that revision only.")],
    state_dir: StateOption,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also one that is pinned, or that another model's settings name.")
    ] = False,
    dry_run: DryRunOption = False,
    is_json: JsonOption = False,
) -> None:
    """Remove a model, its replicas and its bytes, or one revision that nothing points at."""
    run(model_versions.remove(state_of(state_dir), console, name, is_forced=force, is_json=is_json, is_dry_run=dry_run))


@app.command("gc")
def models_gc(
    state_dir: StateOption,
    *,
    dry_run: DryRunOption = False,
    grace: Annotated[
        float | None, typer.Option(help="Keep what is younger than this many seconds.", show_default="the registry's")
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Remove blobs that no model and no artifact uses, and unfinished uploads."""
    options = CollectOptions(is_dry_run=dry_run, grace_seconds=grace, is_json=is_json)
    run(models_gc_command(state_of(state_dir), console, options))


@app.command("show")
def models_show(
    name: Annotated[str, typer.Argument(help="Name or alias; MODEL@TAG for a tag's revision.")],
    state_dir: StateOption,
    *,
    is_json: JsonOption = False,
) -> None:
    """Show one model: state, revision, resources, tags."""
    run(commands.models_show(state_of(state_dir), console, name, is_json=is_json))


@app.command("usage")
def models_usage(
    state_dir: StateOption,
    name: Annotated[str, typer.Argument(help="Name or alias; empty: all models, a line each.")] = "",
    *,
    hours: Annotated[int, typer.Option(help="How many hours, the one that runs included.", min=1, max=8784)] = 24,
    is_json: JsonOption = False,
) -> None:
    """Show how much models are used, what is expected of them, and how right that was."""
    run(usages.usage(state_of(state_dir), console, name, hour_count=hours, is_json=is_json))


def _manner(interval: str, policy: str, weight: int | None, *, is_following: bool) -> following.Manner | None:
    manner = following.Manner(interval, policy, weight)
    if not is_following and manner != following.Manner():
        raise typer.BadParameter("--interval, --policy and --weight go with --follow")
    return manner if is_following else None
