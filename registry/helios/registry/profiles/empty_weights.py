"""``python -m helios.registry.profiles.empty_weights FILE``: a model's modules, from its config alone.

The model is built on the meta device, where a tensor has a shape and no bytes, so a model of any size takes a second
and no memory to speak of. Accelerate then says what its parts weigh, and the model which of them may not be split over
devices (``_no_split_modules``). A process of its own, because importing torch takes seconds and half a gigabyte, and
since a model's code is a model's code. Prints one JSON object: the plan, or ``{"error": …}``. Standard input is the
lifeline: it ends with the registry, and so does this process.
"""

import json
import sys
from pathlib import Path
from typing import Any

from helios.registry.convert import follow_parent


def main(path: Path) -> dict[str, Any]:
    """Returns the plan of the model whose config.json this is; sizes are of the type that the config names."""
    import torch  # noqa: PLC0415 - only when there is a file to read
    from accelerate import init_empty_weights  # type: ignore[import-untyped]  # noqa: PLC0415
    from accelerate.utils import (  # type: ignore[import-untyped]  # noqa: PLC0415
        compute_module_sizes,
        find_tied_parameters,
    )
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: PLC0415

    # A directory, so that no hub is asked; code that a repository brings is never run.
    config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    with init_empty_weights():
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError:
            # What generates no text: a model that makes vectors.
            model = AutoModel.from_config(config, trust_remote_code=False)
    model.tie_weights()
    dtype = getattr(config, "dtype", None)
    sizes = compute_module_sizes(model, dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)
    whole = sorted({str(name) for name in (model._no_split_modules or ())})
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in whole]
    inner = tuple(f"{name}." for name in blocks)
    parts = [name for name, module in model.named_modules() if name and not any(module.children())]
    others = [name for name in parts if name not in blocks and not name.startswith(inner) and sizes[name]]
    return {
        "model_class": type(model).__name__,
        "no_split_classes": whole,
        "blocks": [[name, int(sizes[name])] for name in blocks],
        "others": [[name, int(sizes[name])] for name in others],
        "tied": [sorted(group) for group in find_tied_parameters(model)],
        "total_bytes": int(sizes[""]),
    }


if __name__ == "__main__":
    follow_parent()
    try:
        _found = main(Path(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 - whatever a model's code raises is the answer
        _found = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(_found) + "\n")
