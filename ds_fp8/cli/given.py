"""What is given to several commands: the configuration and the model.

The configuration is a file, base64 as DeepSpeed takes it, or `-` for standard input; the model is `module:factory`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

from .. import config
from ..config.source import Document


def document_of(name: str) -> Document:
    """Read it; never raises for what the user wrote."""
    if name != "-":
        return config.read(name)
    stream = sys.stdin
    raw = getattr(stream, "buffer", None)
    text = "" if stream is None else stream.read() if raw is None else raw.read().decode(errors="backslashreplace")
    return config.parse(text.removeprefix("\ufeff"), "standard input")


def build_model(name: str, no_meta: bool) -> Any:
    """Import `module:factory` from the current folder or an installed package, and call the factory.

    no_meta  build on the default device instead of `meta`
    Raises whatever module and factory raise, ValueError for another form, TypeError for what is no model.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError("write it as module:factory, e.g. train:build_model for build_model() in train.py")
    if module_name.endswith(".py") or "/" in module_name:
        imported = module_name.removesuffix(".py").removeprefix("./").replace("/", ".")
        raise ValueError(f"write the module as Python imports it: {imported}:{attribute}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0]:
            raise  # something that the module itself imports
        place = f"in {folder} or among the installed packages"
        raise ValueError(f"no module {error.name} {place}; go to the folder of its file") from None
    factory = getattr(module, attribute)
    import torch

    with contextlib.nullcontext() if no_meta else torch.device("meta"):
        try:
            model = factory()
        except SystemExit as error:  # a script's own parser, e.g.; the exit code would be taken for ours
            raise RuntimeError(
                f"{attribute}() ended Python with exit code {error.code}; it must return a model"
            ) from None
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{attribute}() returned {type(model).__name__}, not a torch.nn.Module")
    return model
