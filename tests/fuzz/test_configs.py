"""Mutated configurations: `config.check` always answers with problems, `config.load` with Settings or ConfigError,
nothing else.

The start is each preset of `configs/`; keys are dropped, doubled in other words, and given values of any JSON type.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

from budget import seeds

from ds_fp8 import config
from ds_fp8.errors import ConfigError

PRESETS = [json.loads(path.read_text()) for path in sorted(Path(__file__).parents[2].glob("configs/**/*.json"))]
WORDS = ("fp8", "msamp", "enabled", "recipe", "margin", "opt_level", "layers", "include", "telemetry", "compile",
         "bf16", "zero_optimization", "stage", "optimizer", "", "é\0", "O3", "auto", "fp16", "e4m3",
         "checkpoint_fallback")  # fmt: skip


def value(chosen: random.Random, depth: int = 0) -> Any:
    kinds = [
        lambda: chosen.choice((None, True, False, -1, 0, 1, 2**63, -(2**70), 1.5, 1e308, float("inf"), float("nan"))),
        lambda: chosen.choice(WORDS),
        lambda: "x" * chosen.choice((1, 1000)),
        lambda: [value(chosen, depth + 1) for _ in range(chosen.randrange(4))] if depth < 3 else [],
        lambda: (
            {chosen.choice(WORDS): value(chosen, depth + 1) for _ in range(chosen.randrange(4))} if depth < 3 else {}
        ),
    ]
    return chosen.choice(kinds)()


def mutate(chosen: random.Random, data: dict[str, Any]) -> None:
    """One change somewhere in nested dicts."""
    node = data
    while True:
        inner = [each for each in node.values() if isinstance(each, dict) and each]
        if not inner or chosen.random() < 0.4:
            break
        node = chosen.choice(inner)
    key = chosen.choice(list(node)) if node and chosen.random() < 0.7 else chosen.choice(WORDS)
    if chosen.random() < 0.2:
        node.pop(key, None)
    elif chosen.random() < 0.2 and isinstance(key, str):
        node[key.replace("_", "-", 1)] = node.get(key)
    else:
        node[key] = value(chosen)


def test_every_json_is_answered():
    """Presets, changed in one to four places."""
    answers = {"settings": 0, "errors": 0}
    for seed in seeds(5.0):
        chosen = random.Random(seed)
        data = copy.deepcopy(chosen.choice(PRESETS))
        for _ in range(chosen.randrange(1, 5)):
            mutate(chosen, data)
        try:
            problems = config.check(copy.deepcopy(data))
            for problem in problems:
                assert str(problem)
            loaded = config.load(copy.deepcopy(data))
        except ConfigError as error:
            loaded = None
            assert str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {data!r}") from error
        wrong = [problem for problem in problems if problem.severity == "error"]
        # `check` looks at DeepSpeed's keys too; what `load` takes may have errors there, which DeepSpeed will refuse.
        ours = [problem for problem in wrong if problem.path.split("/")[0] in ("fp8", "msamp")]
        agreed = bool(wrong) if loaded is None else not ours or not loaded.enabled
        assert agreed, f"seed {seed}: check and load disagree about {data!r}: {wrong}"
        answers["errors" if loaded is None else "settings"] += 1
    assert all(answers.values()), answers
