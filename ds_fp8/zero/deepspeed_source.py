"""What a DeepSpeed defines, read off its source: a folder, an sdist, a wheel, or the installed package; nothing is
imported.

    source = DeepSpeedSource.at("deepspeed-0.19.9.tar.gz")
    source.version                                                      '0.19.9'
    source.parameters("deepspeed.runtime.engine", "DeepSpeedEngine.save_checkpoint")    ('self', 'save_dir', ...)
    source.attributes("deepspeed.runtime.engine", "DeepSpeedEngine")    methods and every `self.x = ...`, inherited too
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from ..errors import PrivateNameError


class DeepSpeedSource:
    """Modules by dotted name. `read(path)` gives the text of `deepspeed/...py`, or None."""

    def __init__(self, read: Callable[[str], str | None], where: str):
        self._read, self.where = read, where
        self._modules: dict[str, ast.Module | None] = {}
        # Asked once for each of some 600 names, of a dozen classes.
        self._attributes: dict[tuple[str, str], set[str]] = {}
        self._hung_on: dict[tuple[str, ...], set[str]] = {}

    @classmethod
    def installed(cls) -> DeepSpeedSource:
        """The package that `import deepspeed` would take."""
        spec = importlib.util.find_spec("deepspeed")
        if spec is None or not spec.submodule_search_locations:
            raise PrivateNameError("DeepSpeed is not installed.")
        return cls.at(Path(spec.submodule_search_locations[0]).parent)

    @classmethod
    def at(cls, path: str | Path) -> DeepSpeedSource:
        """A source tree (or a folder of packages), an sdist (.tar.gz, .zip) or a wheel; PrivateNameError for anything
        else.
        """
        path = Path(path)
        if path.is_dir():
            root = path if (path / "deepspeed").is_dir() else path.parent
            return cls._checked(lambda name: _text_of(root / name), str(path))
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                files = {_inner(name): archive.read(name).decode() for name in archive.namelist() if _wanted(name)}
            return cls._checked(files.get, str(path))
        if path.is_file() and tarfile.is_tarfile(path):
            files = {}
            with tarfile.open(path) as archive:
                for member in archive.getmembers():
                    content = archive.extractfile(member) if member.isfile() and _wanted(member.name) else None
                    if content is not None:
                        files[_inner(member.name)] = content.read().decode()
            return cls._checked(files.get, str(path))
        raise PrivateNameError(f"{path}: no DeepSpeed here; give a source tree, an sdist (.tar.gz) or a wheel (.whl).")

    @classmethod
    def _checked(cls, read: Callable[[str], str | None], where: str) -> DeepSpeedSource:
        if read("deepspeed/runtime/engine.py") is None:
            raise PrivateNameError(f"{where}: has no deepspeed/runtime/engine.py, so it is no DeepSpeed.")
        return cls(read, where)

    @functools.cached_property
    def version(self) -> str:
        """As the package says it; empty when it does not."""
        for name in ("version.txt", "deepspeed/git_version_info_installed.py", "PKG-INFO", "METADATA"):
            found = re.search(
                r"(?:^|[vV]ersion\s*[=:]\s*['\"]?)(\d+\.\d+[\w.+]*)", self._read(name) or "", re.MULTILINE
            )
            if found:
                return found[1]
        return ""

    def module(self, name: str) -> ast.Module | None:
        if name not in self._modules:
            path = name.replace(".", "/")
            text = self._read(f"{path}.py")
            text = self._read(f"{path}/__init__.py") if text is None else text
            self._modules[name] = None if text is None else ast.parse(text)
        return self._modules[name]

    def find(self, module: str, path: str) -> ast.AST | None:
        """The definition of `Class`, `function` or `Class.method`, an inherited or an imported one too."""
        tree = self.module(module)
        first, _, rest = path.partition(".")
        found = None if tree is None else _defined(tree, first)
        if found is None:
            source = None if tree is None else _imported_from(tree, first, module)
            return None if source is None else self.find(source, path)
        if not rest or not isinstance(found, ast.ClassDef):
            return None if rest else found
        method = _defined(found, rest)
        if method is None:
            bases = [base.id for base in found.bases if isinstance(base, ast.Name)]
            method = next((hit for base in bases if (hit := self.find(module, f"{base}.{rest}")) is not None), None)
        return method

    def text(self, module: str, path: str) -> str | None:
        """The source of a definition in `module` itself, without its decorators; None when there is none."""
        found = self.find(module, path)
        if not isinstance(found, (ast.FunctionDef, ast.ClassDef)):
            return None
        lines = (self._read(f"{module.replace('.', '/')}.py") or "").splitlines()
        return "\n".join(lines[found.lineno - 1 : found.end_lineno])

    def parameters(self, module: str, path: str) -> tuple[str, ...] | None:
        """Names of a function's parameters in order; None when there is no such function."""
        found = self.find(module, path)
        if not isinstance(found, ast.FunctionDef):
            return None
        given = found.args
        positional = [*given.posonlyargs, *given.args, *([given.vararg] if given.vararg else [])]
        return tuple(one.arg for one in [*positional, *given.kwonlyargs, *([given.kwarg] if given.kwarg else [])])

    def attributes(self, module: str, name: str) -> set[str]:
        """What an instance of a class has: methods, class attributes, `self.x = ...`, of its bases too."""
        if (module, name) not in self._attributes:
            self._attributes[module, name] = self._find_attributes(module, name)
        return self._attributes[module, name]

    def _find_attributes(self, module: str, name: str) -> set[str]:
        found = self.find(module, name)
        if not isinstance(found, ast.ClassDef):
            return set()
        names = set(_body_names(found)) | set(_assigned(found, {"self"}))
        names |= {f"_{name.lstrip('_')}{own}" for own in names if own.startswith("__")}
        home = self._home(module, name)
        for base in found.bases:
            if isinstance(base, ast.Name):
                names |= self.attributes(home, base.id)
        return names

    def names(self, module: str) -> set[str]:
        """What `from module import ...` finds: definitions, assignments, imports."""
        tree = self.module(module)
        found: set[str] = set()
        for node in [] if tree is None else _direct(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= {(one.asname or one.name).partition(".")[0] for one in node.names}
                if isinstance(node, ast.ImportFrom) and any(one.name == "*" for one in node.names):
                    path = [*module.split("."), "x"][: -node.level] if node.level else []
                    found |= self.names(".".join([*path, node.module or ""]).strip("."))
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
        return found

    def hung_on(self, *modules: str) -> set[str]:
        """Attributes that the code of `modules` writes on any object: what ZeRO hangs on a parameter, for example."""
        if modules not in self._hung_on:
            trees = [tree for module in modules if (tree := self.module(module)) is not None]
            self._hung_on[modules] = {name for tree in trees for name in _assigned(tree, None)}
        return self._hung_on[modules]

    def _home(self, module: str, name: str) -> str:
        tree = self.module(module)
        if tree is None or _defined(tree, name) is not None:
            return module
        source = _imported_from(tree, name, module)
        return module if source is None else self._home(source, name)


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _wanted(name: str) -> bool:
    return name.endswith(".py") or PurePosixPath(name).name in ("version.txt", "PKG-INFO", "METADATA")


def _inner(name: str) -> str:
    """Without the folder that an sdist has on top, or the metadata folder of a wheel."""
    parts = PurePosixPath(name).parts
    if "deepspeed" in parts[:2]:
        return "/".join(parts[parts.index("deepspeed") :])
    return parts[-1] if len(parts) <= 2 else name


def _defined(scope: ast.Module | ast.ClassDef, name: str) -> ast.AST | None:
    """The last definition wins, as in Python. Names with two underscores may come mangled."""
    mangled = f"_{scope.name.lstrip('_')}" if isinstance(scope, ast.ClassDef) else None
    hits = [
        node
        for node in _direct(scope)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        and (node.name == name or (mangled and f"{mangled}{node.name}" == name))
    ]
    return hits[-1] if hits else None


@functools.cache
def _direct(scope: ast.Module | ast.ClassDef) -> tuple[ast.stmt, ...]:
    """Statements of a scope, those under `if` and `try` too."""
    found: list[ast.stmt] = []
    waiting = list(scope.body)
    while waiting:
        node = waiting.pop(0)
        found.append(node)
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            waiting.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
    return tuple(found)


def _body_names(scope: ast.ClassDef) -> Iterator[str]:
    for node in _direct(scope):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
            if node.name.startswith("__") and not node.name.endswith("__"):
                yield f"_{scope.name.lstrip('_')}{node.name}"
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def _assigned(scope: ast.AST, owners: set[str] | None) -> Iterator[str]:
    """x of every `owner.x = ...` (also in a tuple, a `for` or a `with`); of any owner when `owners` is None."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and _is_dict(node.value):
            owner, name = node.value.value, str(node.slice.value)  # type: ignore[attr-defined]
        else:
            continue
        if owners is None or (isinstance(owner, ast.Name) and owner.id in owners):
            yield name


def _is_dict(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "__dict__"


def _imported_from(tree: ast.Module, name: str, module: str) -> str | None:
    """The module that `name` was imported from; None if it was not, or not from DeepSpeed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
            if node.level:
                parts = module.split(".")[: -node.level]
                return ".".join([*parts, node.module or ""]).rstrip(".")
            if (node.module or "").startswith("deepspeed"):
                return node.module
    return None
