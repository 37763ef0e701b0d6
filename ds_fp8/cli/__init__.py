"""The commands of `ds_fp8`; `main.COMMANDS` lists them.

Every command answers with an exit code (0 fine, 1 problems found, 2 could not be asked) and, where a machine may want
the answer, with `--json`. A command imports what it needs when it runs, so that `check` never waits for torch.
"""
