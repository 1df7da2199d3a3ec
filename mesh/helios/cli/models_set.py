"""``helios models set``: changes how a model's engine is set, in the registry."""

import json

from google.protobuf.json_format import MessageToDict, Parse
from rich.console import Console

from helios.api.engine.v1 import engine_settings_pb2 as pb
from helios.cli import engine_settings
from helios.cli.edge import open_admin
from helios.cli.options import NOTHING_DONE
from helios.cli.state import StateDirectory
from helios.mesh.errors import ModelNotFound
from helios.registry.client import EngineSettings, Model, RegistryClient


async def models_set(
    state: StateDirectory,
    console: Console,
    name: str,
    assignments: tuple[str, ...],
    removals: tuple[str, ...],
    *,
    is_dry_run: bool = False,
    is_json: bool = False,
) -> None:
    """Changes a model's engine settings; without a change, shows them and the keys that there are."""
    async with open_admin(state) as dialer:
        registry = RegistryClient(dialer)
        model = await registry.get_model(name)
        if assignments or removals:
            settings = engine_settings.change(settings_of(model), assignments, removals)
            # They are replaced as a whole: what another person has set meanwhile would be gone.
            model = await registry.update_engine_settings(
                model.name, _kept(settings), expected_version=model.version, is_dry_run=is_dry_run
            )
    if is_json:
        shown = {"model": model.name, "engine_settings": engine_settings.flatten(settings_of(model))}
        console.print_json(json.dumps(shown))
        return
    if is_dry_run:
        console.print(NOTHING_DONE.rstrip())
    for key, value in engine_settings.flatten(settings_of(model)).items():
        console.print(f"{key}={value}", markup=False, highlight=False, soft_wrap=True)
    if assignments or removals:
        console.print("replicas that run keep their settings; the next start has these", style="dim")
    else:
        keys = ", ".join(engine_settings.setting_keys())
        console.print(f"to be set with --set KEY=VALUE: {keys}", style="dim", soft_wrap=True)


async def changed_settings(registry: RegistryClient, name: str, assignments: tuple[str, ...]) -> EngineSettings:
    """Returns a model's settings with some changed, whether it exists already or not."""
    try:
        settings = settings_of(await registry.get_model(name))
    except ModelNotFound:
        settings = pb.EngineSettings()
    return _kept(engine_settings.change(settings, assignments))


def settings_of(model: Model) -> pb.EngineSettings:
    """Returns a model's engine settings as the contract's message."""
    return Parse(model.engine_settings.document, pb.EngineSettings(), ignore_unknown_fields=True)


def _kept(settings: pb.EngineSettings) -> EngineSettings:
    return EngineSettings(json.dumps(MessageToDict(settings, preserving_proto_field_name=True), sort_keys=True))
