"""Write `docs/api.md`: what a script may call, from the signatures and docstrings in the code.

python docs/generate_api.py
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "api.md"

HEAD = """# API reference

No job needs it: the JSON is the interface. For scripts that want to ask or to decide for themselves. Generated from the
code by `docs/generate_api.py`; names that are not here may change without notice.
"""

PUBLIC = {
    "ds_fp8": ("ds_fp8/__init__.py", ["activate", "deactivate", "is_active", "checkpoint_on_signal"]),
    "ds_fp8.config": ("ds_fp8/config/loading.py", ["load", "check"]),
    "ds_fp8.config, what `load` returns": (
        "ds_fp8/config/settings.py",
        ["Settings", "Fp8Settings", "LayerSettings", "MsampSettings", "TelemetrySettings", "DeepSpeedFacts"],
    ),
    "ds_fp8.plan": ("ds_fp8/plan/make.py", ["make_plan"]),
    "ds_fp8.plan, its cost": ("ds_fp8/plan/estimate.py", ["estimate", "Estimate"]),
    "ds_fp8.telemetry": ("ds_fp8/telemetry/jsonl_log.py", ["read_jsonl_log"]),
    "ds_fp8.errors": (
        "ds_fp8/errors.py",
        ["DsFp8Error", "ConfigError", "Problem", "PlanError", "BackendError", "LayerError", "CheckpointError"],
    ),
}
"""Title -> (file, names)."""


def entry(module: str, node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """One function or class: its signature, its fields, its docstring as it stands."""
    doc = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    name = f"{module.partition(',')[0]}.{node.name}"
    lines = [f"### `{name}`", ""]
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        lines += ["```python", f"{node.name}({ast.unparse(node.args)}){returns}", "```", ""]
    else:
        fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        lines += [
            "```python",
            f"class {node.name}({bases})" if bases else f"class {node.name}",
            *(f"    {f}" for f in fields),
        ]
        lines += ["```", ""]
    head, _, rest = doc.partition("\n\n")
    lines += [head, ""]
    # Tables of arguments are aligned by blanks: they stay as they are.
    lines += ["```text", rest.rstrip(), "```", ""] if rest.strip() else []
    return lines


def reference() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, (file, names) in PUBLIC.items():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        known = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        lines += [f"## {title}", ""]
        for name in names:
            lines += entry(title, known[name])
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(TARGET)
