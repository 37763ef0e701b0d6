"""Run one script several times for the price of one start:   python run_forked.py script.py ARGUMENTS [-- ARGUMENTS]...

The script's imports are run once, in its own order, in a Python that has imported nothing of ours itself; then each
list of arguments gets a fork, which runs the rest as `__main__`. So a comparison of two JSON files costs the import of
Transformers and DeepSpeed once, and the import hook is met as the script meets it: a fork has whatever its parent has.

Each run is introduced by `=== RUN n` and followed by `=== FP8 layers m` for the modules that the script's globals
hold and `=== EXIT code`; the exit code is that of the worst run. Under a
launcher each rank does the same; every run has a port of its own.
"""

import ast
import os
import sys


def split(arguments: list[str]) -> list[list[str]]:
    runs: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--":
            runs.append([])
        else:
            runs[-1].append(argument)
    return runs


def count_fp8_layers(names: dict) -> int:
    """Distinct FP8 layers in the modules that a script made (a Trainer holds its model)."""
    found = set()
    for value in list(names.values()):
        for owner in (value, getattr(value, "__dict__", {}).get("model")):
            modules = getattr(owner, "modules", None)
            if callable(modules) and not isinstance(owner, type):
                found |= {id(module) for module in modules() if type(module).__name__ in ("Fp8Linear", "Fp8Conv1D")}
    return len(found)


def main() -> int:
    script, runs = sys.argv[1], split(sys.argv[2:])
    # As Python itself does for a script; by os alone, so that nothing is imported before the script.
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # noqa: PTH100, PTH120
    with open(script) as file:  # noqa: PTH123
        tree = ast.parse(file.read(), script)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    rest = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {"__name__": "__main__", "__file__": script}
    exec(compile(ast.Module(imports, []), script, "exec"), names)
    worst = 0
    for number, arguments in enumerate(runs):
        if worst:
            pass  # other ranks would wait for this one
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            sys.argv = [script, *arguments]
            if "MASTER_PORT" in os.environ:  # ranks of this run must not meet a store of the last one
                os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + number)
            print(f"=== RUN {number}", flush=True)
            code = 1
            try:
                exec(compile(ast.Module(rest, []), script, "exec"), names)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0) if not isinstance(end.code, str) else 1
            except BaseException:  # noqa: BLE001 - as Python itself at the end of a script
                import traceback

                traceback.print_exc()
            print(f"=== FP8 layers {count_fp8_layers(names)}\n=== EXIT {code}", flush=True)
            os._exit(code)
        _, status = os.waitpid(child, 0)
        worst = max(worst, os.waitstatus_to_exitcode(status))
    return worst


if __name__ == "__main__":
    sys.exit(main())
