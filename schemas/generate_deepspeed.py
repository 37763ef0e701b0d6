"""Write `deepspeed.schema.json`: a JSON Schema of DeepSpeed's own configuration, from the installed DeepSpeed.

    python schemas/generate_deepspeed.py            rewrite the file
    python schemas/generate_deepspeed.py --stdout   print it

Sections with a pydantic model (`zero_optimization`, `bf16`, `fp16`, monitors, `compile`, ...) come from the model, with
two repairs: callables in `json_schema_extra` cannot be JSON, and "auto", which DeepSpeed strips from every section
before validation, is allowed for every key. The top level and the sections without a model are read by hand-written
code in DeepSpeed, so they are written by hand here (`deepspeed_by_hand.py`); `keys_deepspeed_asks_for` proves that none
was forgotten, by letting DeepSpeed parse a dict that notes what it is asked for.

Custom keywords: `x-removed` (DeepSpeed refuses the key; the text is the cure), `x-replacement` (deprecated),
`x-tolerant` (unknown keys of this object are ignored in silence, so a finding is a warning).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from deepspeed_by_hand import BY_HAND, REMOVED, REMOVED_ZERO, TOP_LEVEL  # found beside this file

TARGET = Path(__file__).resolve().parent / "deepspeed.schema.json"


def models() -> dict[str, Any]:
    """Top-level key -> pydantic model."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "hybrid_engine": HybridEngineConfig,
        "tensor_parallel": TPTrainingConfig,
        "weight_quantization": WeightQuantConfig,
    }


def model_schema(model: Any) -> dict[str, Any]:
    """The JSON Schema of one model, both names of aliased fields included, with its nested models under `$defs`."""
    from pydantic.json_schema import GenerateJsonSchema

    class Tolerant(GenerateJsonSchema):
        """Types that JSON cannot say (torch dtypes, process groups) become "anything"."""

        def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
            return {}

        def encode_default(self, dft: Any) -> Any:
            try:
                return super().encode_default(dft)
            except Exception:  # noqa: BLE001  # a default that is no JSON is simply not told
                return None

    import warnings

    extras = _take_extras(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schema = model.model_json_schema(by_alias=False, schema_generator=Tolerant)
    finally:
        for field, extra in extras.items():
            field.json_schema_extra = extra
    for name, field in model.model_fields.items():
        entry = schema["properties"][name]
        extra = extras.get(_Field(field), None)
        if extra and extra.get("deprecated"):
            entry["deprecated"] = True
            entry["x-replacement"] = extra.get("new_param", "")
        if field.alias and field.alias != name:
            schema["properties"][field.alias] = entry
    return schema


class _Field:
    """A pydantic field as a dict key (fields themselves are not hashable)."""

    def __init__(self, field: Any):
        self.__dict__["field"] = field

    def __hash__(self) -> int:
        return id(self.field)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Field) and self.field is other.field

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.field, name, value)


def _take_extras(model: Any) -> dict[_Field, Any]:
    taken = {}
    for field in model.model_fields.values():
        if isinstance(field.json_schema_extra, dict):
            taken[_Field(field)] = field.json_schema_extra
            field.json_schema_extra = None
    if taken:
        model.model_rebuild(force=True)
    return taken


def tidy(node: Any, definitions: dict[str, Any]) -> Any:
    """One entry without titles and prose, with local references inlined and "auto" allowed."""
    if "$ref" in node:
        resolved = dict(definitions[node["$ref"].rsplit("/", 1)[1]])
        resolved.update({key: value for key, value in node.items() if key != "$ref"})
        node = resolved
    if "allOf" in node and len(node["allOf"]) == 1:
        node = {**node["allOf"][0], **{key: value for key, value in node.items() if key != "allOf"}}
        return tidy(node, definitions)
    kept = {key: value for key, value in node.items() if key not in ("title", "description", "$defs")}
    if "default" in kept and kept["default"] is None:
        del kept["default"]
    if "anyOf" in kept:
        kept = _merge_alternatives(kept, definitions)
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = _without_auto(tidy(kept[key], definitions))
    if "properties" in kept:
        kept["properties"] = {name: tidy(entry, definitions) for name, entry in kept["properties"].items()}
    return _with_auto(kept)


def _merge_alternatives(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """`anyOf: [X, null]` as one entry of type [X, null]: errors then speak of X, not of alternatives."""
    options = [_without_auto(tidy(option, definitions)) for option in node.pop("anyOf")]
    real = [option for option in options if option.get("type") != "null"]
    if len(real) == 1:
        merged = dict(real[0])
    elif all("type" in option for option in real):
        merged = {"type": sorted({kind for option in real for kind in _as_list(option["type"])})}
    else:
        merged = {}
    if len(real) < len(options) and "type" in merged:
        merged["type"] = [*_as_list(merged["type"]), "null"]
    return {**merged, **node}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _with_auto(node: dict[str, Any]) -> dict[str, Any]:
    if "enum" in node:
        node = {key: value for key, value in node.items() if key != "type"}
        node["enum"] = list(dict.fromkeys([*node["enum"], "auto"]))
    elif "type" in node and "string" not in _as_list(node["type"]) and "pattern" not in node:
        node = {**node, "type": [*_as_list(node["type"]), "string"], "pattern": "^auto$"}
    return node


def _without_auto(node: dict[str, Any]) -> dict[str, Any]:
    if "enum" in node:
        return {**node, "enum": [choice for choice in node["enum"] if choice != "auto"]}
    if node.get("pattern") == "^auto$":
        types = [kind for kind in node["type"] if kind != "string"]
        node = {key: value for key, value in node.items() if key != "pattern"}
        node["type"] = types[0] if len(types) == 1 else types
    return node


def section(name: str, model: Any) -> dict[str, Any]:
    """A top-level section from its model."""
    raw = model_schema(model)
    entry = _without_auto(tidy(raw, raw.get("$defs", {})))
    return {**TOP_LEVEL.get(name, {}), **entry}


def build() -> dict[str, Any]:
    """The whole schema."""
    import deepspeed

    properties: dict[str, Any] = {name: _with_auto(dict(entry)) for name, entry in TOP_LEVEL.items()}
    for name, entry in BY_HAND.items():
        nested = {key: _with_auto(dict(value)) for key, value in entry["properties"].items()}
        properties[name] = {**TOP_LEVEL[name], **entry, "properties": nested}
    properties.update({name: section(name, model) for name, model in models().items()})
    zero = properties["zero_optimization"]
    zero["type"] = ["object", "boolean"]
    zero["properties"].update({key: {"not": {}, "x-removed": cure} for key, cure in REMOVED_ZERO.items()})
    properties.update({key: {"not": {}, "x-removed": cure} for key, cure in REMOVED.items()})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "deepspeed.schema.json",
        "title": "DeepSpeed configuration",
        "description": "Generated by generate_deepspeed.py; documentation: https://www.deepspeed.ai/docs/config-json/",
        "x-deepspeed-version": deepspeed.__version__,
        "type": "object",
        "properties": dict(sorted(properties.items())),
    }


def keys_deepspeed_asks_for() -> set[str]:
    """Every top-level key that the installed DeepSpeed's parser looks at."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()

    class Noting(dict):  # type: ignore[type-arg]
        def get(self, key: Any, default: Any = None) -> Any:
            asked.add(key)
            return dict.get(self, key, default)

        def __contains__(self, key: Any) -> bool:
            asked.add(key)
            return dict.__contains__(self, key)

        def __getitem__(self, key: Any) -> Any:
            asked.add(key)
            return dict.__getitem__(self, key)

        def __copy__(self) -> Noting:
            return Noting(self)

        def keys(self) -> Any:
            return self

    DeepSpeedConfig(Noting(train_batch_size=1))
    return asked


def render(schema: dict[str, Any]) -> str:
    """Stable text, so that a regenerated file shows only what DeepSpeed changed."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write deepspeed.schema.json from the installed DeepSpeed.")
    parser.add_argument("--stdout", action="store_true", help="print instead of writing the file")
    options = parser.parse_args(argv)
    text = render(build())
    if options.stdout:
        sys.stdout.write(text)
    else:
        TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
