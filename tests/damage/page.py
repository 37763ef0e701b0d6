"""The damage table as a page: a line for each trial, then whatever was neither refused nor harmless."""

from __future__ import annotations

import re
from typing import Any

SHOWN = ("refused", "harmless", "other losses", "other state", "refused late", "raw error", "ranks differ", "hang")
HEAD = """# Damage to checkpoints: what is refused, what is harmless

Written by `python tests/damage/run.py --write {target}`; do not edit.
{software}.

Every entry of a checkpoint's files, ours and DeepSpeed's beside it, is damaged in every wrong way: deleted, None, text,
NaN, negative, huge, emptied; tensors short, long, of another type, with a NaN, on meta, changed in one element,
reordered. So is each file: a bit of each record, cut off, zeros, a folder, a link, another save's. With two ranks the
damage meets the last rank alone: its shard, or its own copy of the model file. The engine is compared by a fingerprint
of weights, states, scales, histories, scheduler and counters; *harmless*: the next two losses and that fingerprint are
those of the undamaged checkpoint. *Another number* is a value of the right kind: another learning rate, another
element of a weight. `1/N`: each Nth damage was tried, or with a seed as many, drawn at random.
"""


def page(table: dict[str, dict[str, Any]], target: str) -> str:
    """The whole page; `table` by the trials' names: {every, found: [{file, damage, kind, outcome, said}]}."""
    import deepspeed
    import torch

    import ds_fp8

    software = f"ds_fp8 {ds_fp8.__version__}, DeepSpeed {deepspeed.__version__}, torch {torch.__version__}, CPU ranks"
    every = [one for trial in table.values() for one in trial["found"]]
    lines = [HEAD.format(target=target, software=software), f"{len(every)} damages.", ""]
    lines += [f"| job | tried | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 2) + "|"]
    for name, trial in table.items():
        counts = [sum(one["outcome"] == outcome for one in trial["found"]) for outcome in SHOWN]
        seed = "" if trial.get("seed") is None else f", seed {trial['seed']}"
        part = f" (1/{trial['every']}{seed})" if trial["every"] > 1 else ""
        lines.append(f"| {name} | {len(trial['found'])}{part} | {' | '.join(map(str, counts))} |")
    lines += ["", "## Neither refused nor harmless", ""]
    for kind, title in (("number", "Another number, believed"), ("", "Of the wrong kind")):
        found: dict[str, list[str]] = {}
        for name, trial in table.items():
            for one in trial["found"]:
                if one["outcome"] not in ("refused", "harmless") and (one["kind"] == "number") == (kind == "number"):
                    found.setdefault(f"{entry(one)}, {one['outcome']}", []).append(name.rpartition(",")[2].strip())
        lines += [f"{title}:{'' if found else ' none.'}", ""]
        lines += [f"- {what} ({', '.join(sorted(set(where)))})" for what, where in sorted(found.items())]
        lines += [""] * bool(found)
    return "\n".join(lines)


def bad(table: dict[str, dict[str, Any]]) -> list[str]:
    """What must not be: beside a manifest everything is refused or harmless; without one, another number may be
    believed, and nothing ends in a raw error, a changed engine, two opinions or a hang.
    """
    wrong = []
    for name, trial in table.items():
        believed = ("other losses", "other state") if name.endswith("without manifest") else ()
        for one in trial["found"]:
            allowed = ("refused", "harmless", *(believed if one["kind"] == "number" else ()))
            if one["outcome"] not in allowed:
                wrong.append(f"{name}: {entry(one)}: {one['outcome']}: {one['said']}")
    return wrong


def entry(found: dict[str, Any]) -> str:
    """`shard or model file: entry: how`, without numbers of weights and groups."""
    file = "shard" if found["file"].endswith("optim_states.pt") else "model file"
    return f"{file}: `" + re.sub(r"module/[^:]+:", "module/WEIGHT:", found["damage"]) + "`"
