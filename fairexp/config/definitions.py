"""Where a dotted name is defined, found by reading source files; nothing is imported.

`config/targets` reads signatures from what this finds. Names are followed through imports, assignments and star
imports; where only running the code would tell, the answer is a node that is neither a class nor a function.
"""

import ast
import difflib
import functools
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

# Bases without a constructor of their own; a NamedTuple's constructor is written in the class that names it.
PLAIN_BASES = {"object", "abc.ABC", "typing.Generic", "typing.Protocol", "typing_extensions.Protocol"}
PLAIN_BASES |= {"typing.NamedTuple"}


class TargetError(Exception):
    """A target that can't exist; the message says what is missing, and the nearest names that do exist."""


@dataclass(frozen=True)
class Import:
    """`import module` or, with a name, `from module import name`; level counts the dots in front."""

    module: str
    name: str | None = None
    level: int = 0


@dataclass
class Bindings:
    """What the names of a module or class body may stand for: several things where an if or a try decides."""

    bound: dict[str, list[ast.AST | Import]] = field(default_factory=dict)
    stars: list[Import] = field(default_factory=list)
    computed: bool = False  # some names come from code that would have to run


@dataclass(frozen=True)
class Module:
    name: str
    folders: list[str] | None = field(compare=False)  # where submodules lie; None for a plain module
    root: list[str] = field(compare=False)  # the folders that top-level modules are looked for in
    file: str | None = field(compare=False)
    names: Bindings = field(compare=False)


@dataclass(frozen=True)
class Code:
    """A class or function; any other node: nobody knows what it takes."""

    node: ast.AST
    module: Module = field(compare=False)


def find_code(dotted: str, root: list[str]) -> tuple[Code, str]:
    """The definition, and its name within its module. `root`: the folders to look in, as sys.path."""
    pieces = dotted.split(".")
    if len(pieces) < 2 or not all(piece.isidentifier() for piece in pieces):
        raise TargetError(f"'{dotted}' is not a dotted name such as torch.optim.AdamW")
    for depth in range(len(pieces) - 1, 0, -1):  # a module's file wins over a name in the package above it
        if module := _module(".".join(pieces[:depth]), root):
            break
    else:
        known = {*_modules_in(root), *sys.builtin_module_names}
        raise TargetError(f"no module named '{pieces[0]}'{closest(pieces[0], known)}")
    inner = pieces[depth:]
    if len(inner) > 1 and module.folders is not None and inner[0] not in module.names.bound:
        try:
            member(module, inner[0])
        except TargetError:
            close = closest(inner[0], _names(module), module.name + ".")
            raise TargetError(f"no module named '{module.name}.{inner[0]}'{close}") from None
    found: Module | Code = module
    for piece in inner:
        found = member(found, piece)
    if isinstance(found, Module):
        close = closest(pieces[-1], _names(found), f"{dotted}.")
        raise TargetError(f"{dotted} is a module, not a class or function{close}")
    return found, ".".join(inner)


def closest(name: str, known: Collection[str], prefix: str = "") -> str:
    """`; nearest: a, b` or an empty text: of the similar names, those that begin alike come first."""
    close = difflib.get_close_matches(name, known, n=10)
    close.sort(key=lambda other: other[:3] != name[:3])
    if not close:
        by_lower = {other.lower(): other for other in known}
        close = [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), by_lower)]
    return "; nearest: " + ", ".join(prefix + other for other in close[:3]) if close else ""


# --- modules: found by the import system's finders, read with ast ---


def _module(dotted: str, root: list[str]) -> Module | None:
    pieces = dotted.split(".")
    folders: list[str] | None = root
    spec = None
    for depth in range(1, len(pieces) + 1):
        spec = None if folders is None else _spec(".".join(pieces[:depth]), folders)
        if spec is None:
            return None
        folders = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    assert spec is not None
    file = spec.origin if spec.has_location else None
    if file and file.endswith(".py"):
        return Module(dotted, folders, root, file, _read_file(file, Path(file).stat().st_mtime_ns))
    is_namespace = spec.origin is None and folders  # a folder without __init__.py: modules, and no names
    return Module(dotted, folders, root, file, Bindings(computed=not is_namespace))


def _spec(name: str, folders: list[str]) -> ModuleSpec | None:
    """importlib.util.find_spec without its import of the parent packages."""
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, folders) if hasattr(finder, "find_spec") else None
        except KeyError:  # a namespace folder in a package asks sys.modules for its parent, unless its name has no dot
            spec = PathFinder.find_spec(name.rpartition(".")[2], folders)
        if spec is not None:
            return spec
    return None


def _modules_in(folders: Iterable[str]) -> set[str]:
    entries = [entry for folder in map(Path, folders) if folder.is_dir() for entry in folder.iterdir()]
    code = [entry for entry in entries if entry.suffix in (".py", ".so", ".pyd") or entry.is_dir()]
    return {stem for entry in code if (stem := entry.name.partition(".")[0]).isidentifier()}


@functools.cache
def _read_file(file: str, mtime_ns: int) -> Bindings:
    """`mtime_ns` makes an edited file a new one."""
    source = Path(file).read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence" in other people's code
            names = read_body(ast.parse(source, file).body)
    except (SyntaxError, ValueError) as error:
        raise TargetError(f"{file}:{getattr(error, 'lineno', None) or 1}: {error}") from None
    # A mention in a comment counts too: then a wrong name is found by the run instead of here.
    computing = rb"\bglobals\(\)|\bsys\.modules\[|\bexec\(|^\s+global "
    names.computed = "__getattr__" in names.bound or bool(re.search(computing, source, re.MULTILINE))
    if re.search(rb"\b__all__\s*(\+=|\.)", source):
        names.bound.pop("__all__", None)
    return names


def read_body(body: Sequence[ast.stmt]) -> Bindings:
    names = Bindings()
    _read_statements(body, names, certain=True)
    return names


def _read_statements(body: Sequence[ast.stmt], names: Bindings, certain: bool) -> None:
    def bind(name: str, value: ast.AST | Import, replaces: bool = certain) -> None:
        names.bound[name] = [value] if replaces else [*names.bound.get(name, []), value]

    for node in body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if "overload" not in map(last_name, node.decorator_list):
                    bind(node.name, node)
            case ast.Import():
                for alias in node.names:
                    module = alias.name if alias.asname else alias.name.partition(".")[0]
                    bind(alias.asname or module, Import(module))
            case ast.ImportFrom():
                for alias in node.names:
                    if alias.name == "*":
                        names.stars.append(Import(node.module or "", None, node.level))
                    else:
                        bind(alias.asname or alias.name, Import(node.module or "", alias.name, node.level))
            case ast.Assign():
                for target in node.targets:
                    for name in _stored(target):
                        bind(name, node.value if isinstance(target, ast.Name) else node)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                bind(name, value)
            case ast.Delete() if certain:
                for name in (target.id for target in node.targets if isinstance(target, ast.Name)):
                    names.bound.pop(name, None)
            case ast.For():
                for name in _stored(node.target):
                    bind(name, node, replaces=False)
                _read_statements([*node.body, *node.orelse], names, certain=False)
            case ast.If() | ast.While() | ast.With() | ast.Try() | ast.TryStar() | ast.Match():
                parts = [node, *getattr(node, "handlers", ()), *getattr(node, "cases", ())]
                for branch in ("body", "orelse", "finalbody"):
                    for part in parts:
                        _read_statements(getattr(part, branch, []), names, certain=False)


def _stored(target: ast.AST) -> Iterator[str]:
    return (node.id for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


# --- names: what one stands for ---

_Seen = frozenset[tuple[str, str]]  # the (module, name) pairs being looked up: modules may import each other


def member(owner: Module | Code, name: str, seen: _Seen = frozenset()) -> Module | Code:
    """What `owner.name` is; TargetError only where the owner could be read completely and has no such name."""
    if isinstance(owner, Module):
        return _module_member(owner, name, seen)
    if not isinstance(owner.node, ast.ClassDef):
        return Code(ast.Pass(), owner.module)
    members: set[str] = set()
    for code in lineage(owner):
        if not isinstance(code.node, ast.ClassDef):
            return code
        body = read_body(code.node.body).bound
        if name in body:
            return _one_of(body[name], code.module, seen)
        members |= body.keys()
    raise TargetError(f"{owner.node.name} has no {name}{closest(name, members)}")


def _module_member(module: Module, name: str, seen: _Seen) -> Module | Code:
    is_cycle = (module.name, name) in seen
    seen |= {(module.name, name)}
    unsure = is_cycle or module.names.computed
    if not is_cycle and name in module.names.bound:
        return _one_of(module.names.bound[name], module, seen)
    for star in [] if is_cycle else reversed(module.names.stars):
        source = _module(_absolute(star, module), module.root)
        if source is None:
            unsure = True
        elif _is_exported(source, name):
            with suppress(TargetError):
                found = _module_member(source, name, seen)
                if isinstance(found, Module) or not isinstance(found.node, ast.Pass):
                    return found
                unsure = True
    if module.folders is not None and (submodule := _module(f"{module.name}.{name}", module.root)):
        return submodule
    if unsure:
        return Code(ast.Pass(), module)
    raise TargetError(f"{module.name} has no {name}{closest(name, _names(module))}")


def _one_of(values: list[ast.AST | Import], module: Module, seen: _Seen) -> Module | Code:
    """The thing that all branches agree on (`X = None` where an import failed aside), or an unknown one."""
    found = set()
    for value in values:
        if not isinstance(value, ast.Constant):
            try:
                found.add(_value(value, module, seen))
            except TargetError:
                if len(values) == 1:
                    raise
    return found.pop() if len(found) == 1 else Code(ast.Pass(), module)


def _value(value: ast.AST | Import, module: Module, seen: _Seen = frozenset()) -> Module | Code:
    match value:
        case Import():
            dotted = _absolute(value, module)
            source = _module(dotted, module.root)
            if source is None and _is_inside_computed(dotted, module.root):
                return Code(ast.Pass(), module)
            if source is None:
                raise TargetError(f"no module named '{dotted}', which {module.file or module.name} imports")
            return _module_member(source, value.name, seen) if value.name else source
        case ast.Name():
            with suppress(TargetError):  # a built-in
                return _module_member(module, value.id, seen)
        case ast.Attribute():
            with suppress(TargetError):  # set from outside
                return member(_value(value.value, module, seen), value.attr, seen)
    return Code(value if isinstance(value, ast.AST) else ast.Pass(), module)


def _is_inside_computed(dotted: str, root: list[str]) -> bool:
    """Whether a parent makes its submodules as it runs, as the C extension torch._C does."""
    pieces = dotted.split(".")
    parents = [_module(".".join(pieces[:depth]), root) for depth in range(1, len(pieces))]
    return any(parent is not None and parent.names.computed for parent in parents)


def _absolute(what: Import, module: Module) -> str:
    if what.level == 0:
        return what.module
    parents = module.name.split(".")
    up = what.level - (module.folders is not None)  # in a package's __init__.py one dot is the package itself
    return ".".join([*parents[: len(parents) - up], *filter(None, [what.module])])


def _exported(module: Module) -> set[str] | None:
    """What `__all__` lists; None where there is none, or it is computed."""
    match module.names.bound.get("__all__"):
        case [ast.List(elts=items) | ast.Tuple(elts=items)]:
            return {str(item.value) for item in items if isinstance(item, ast.Constant)}
    return None


def _is_exported(module: Module, name: str) -> bool:
    listed = _exported(module)
    return not name.startswith("_") if listed is None else name in listed


def _names(module: Module, seen: frozenset[str] = frozenset()) -> set[str]:
    """The names to suggest."""
    names = {*module.names.bound, *_modules_in(module.folders or ())}
    for star in module.names.stars:
        source = _module(_absolute(star, module), module.root)
        if source and source.name not in seen:
            names |= _exported(source) or _names(source, seen | {module.name})
    return {name for name in names if not name.startswith("_")}


# --- classes ---


def lineage(code: Code, seen: tuple[Code, ...] = ()) -> list[Code]:
    """A class and its bases in the order in which Python asks them: one reached twice stands at its last place."""
    line, seen = [code], (*seen, code)
    for base in code.node.bases if isinstance(code.node, ast.ClassDef) else ():
        if origin(base, code.module) not in PLAIN_BASES:
            found = _value(base.value if isinstance(base, ast.Subscript) else base, code.module)
            # `class Linear(Linear)` extends what the name stood for before, and that isn't kept
            line += lineage(found, seen) if isinstance(found, Code) and found not in seen else [Code(base, code.module)]
    return list(dict.fromkeys(reversed(line)))[::-1]


def origin(expression: ast.expr, module: Module) -> str:
    """The full dotted name of an expression, by the import of its first name."""
    if isinstance(expression, ast.Call | ast.Subscript):
        return origin(expression.func if isinstance(expression, ast.Call) else expression.value, module)
    text = ast.unparse(expression)
    head, dot, rest = text.partition(".")
    match module.names.bound.get(head):
        case [Import(module=source, name=name)]:
            return ".".join(filter(None, [source, name])) + dot + rest
    return text


def last_name(node: ast.AST | None) -> str | None:
    """The last name of an expression, without its call or brackets: `no_grad` of `torch.no_grad()`."""
    match node:
        case ast.Call(func=inner) | ast.Subscript(value=inner):
            return last_name(inner)
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return None
