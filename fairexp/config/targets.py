"""What a dotted `_target_` takes, found by reading its source; nothing is imported.

`config/validate` calls this before a run is submitted: there, importing torch would cost 1.5 s, and no line of the
user's package may run. What can't be known this way (C extensions, unknown decorators, computed names) is accepted.
"""

import ast
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fairexp.config.definitions import (
    Code,
    Import,
    TargetError,
    closest,
    find_code,
    last_name,
    lineage,
    origin,
    read_body,
)

__all__ = ["Parameter", "Signature", "TargetError", "check_arguments", "find"]

HYDRA_KEYS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
# Decorators that leave the arguments as they are written. Any other makes a signature unknown.
TRANSPARENT = {"staticmethod", "classmethod", "abstractmethod", "override", "final", "deprecated", "set_module"}
TRANSPARENT |= {"wraps", "cache", "lru_cache", "contextmanager", "asynccontextmanager", "runtime_checkable"}
TRANSPARENT |= {"no_grad", "enable_grad", "inference_mode", "total_ordering"}


@dataclass(frozen=True)
class Parameter:
    """One argument as the source writes it."""

    required: bool
    annotation: str | None
    default: str | None
    keyword_only: bool = False


@dataclass(frozen=True)
class Signature:
    """The arguments that can be given by name. `takes_any`: has **kwargs. `unknown`: reading couldn't tell."""

    name: str
    file: str | None
    line: int | None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    takes_any: bool = False
    unknown: bool = False


def find(dotted: str, search_path: Sequence[str] | None = None) -> Signature:
    """The signature of a class or function, or TargetError. `search_path`: folders in front of sys.path."""
    code, name = find_code(dotted, [*map(str, search_path or ()), *sys.path])
    is_class = isinstance(code.node, ast.ClassDef)
    taken = _class_takes(code) if is_class else _function_takes(code.node, is_constructor=False)
    line = getattr(code.node, "lineno", None)
    if taken is None:
        return Signature(name, code.module.file, line, unknown=True)
    return Signature(name, code.module.file, line, *taken)


def check_arguments(signature: Signature, given: Mapping[str, object], provided_later: Collection[str]) -> list[str]:
    """What is wrong with a config node's arguments, one text each. `provided_later`: names that the runtime passes."""
    if signature.unknown:
        return []
    name, parameters, problems = signature.name, signature.parameters, []
    for key in [key for key in given if key not in HYDRA_KEYS]:
        if key in parameters:
            if not _value_fits(parameters[key], given[key]):
                problems.append(f"{name}: '{key}' takes {parameters[key].annotation}, got {given[key]!r}")
        elif not signature.takes_any:
            takes = f"it takes: {', '.join(parameters)}" if parameters else "it takes no named arguments"
            problems.append(f"{name} takes no '{key}'{closest(key, parameters)}; {takes}")
    # `_partial_` leaves the rest to whoever calls the result; `_args_` fills parameters by position.
    if "_args_" not in given and not given.get("_partial_"):
        missing = [key for key, parameter in parameters.items() if parameter.required and key not in given]
        problems += [f"{name} needs '{key}'" for key in missing if key not in provided_later]
    return problems


# --- signatures ---

_Taken = tuple[dict[str, Parameter], bool] | None  # the parameters, and whether there is **kwargs; None: unknown


def _class_takes(code: Code) -> _Taken:
    for owner in _constructor_owners(code):
        node = owner.node
        if not isinstance(node, ast.ClassDef) or not _is_plain(owner):
            return None
        body = read_body(node.body).bound
        for method in ("__init__", "__new__"):
            if method in body:
                return _function_takes(body[method][0], is_constructor=True) if len(body[method]) == 1 else None
        is_record = any(origin(base, owner.module) == "typing.NamedTuple" for base in node.bases)
        if is_record or _dataclass_options(owner).get("init"):
            return _fields_take(owner)
    return {}, False


def _constructor_owners(code: Code) -> list[Code]:
    """The bases only where they are needed: reading torch.nn.Module's file alone takes 30 ms."""
    own = read_body(code.node.body).bound if isinstance(code.node, ast.ClassDef) else {}
    return [code] if "__init__" in own or "__new__" in own else lineage(code)


def _function_takes(node: ast.AST | Import, is_constructor: bool) -> _Taken:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    decorators = {*map(last_name, node.decorator_list)}
    if not decorators <= TRANSPARENT:
        return None
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    is_bound = is_constructor or "classmethod" in decorators
    first = max(len(arguments.posonlyargs), int(is_bound))  # positional-only parameters can't be given by name
    by_name = list(zip(positional, defaults, strict=True))[first:]
    taken = {a.arg: _parameter(a.annotation, default) for a, default in by_name}
    for a, keyword_default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        taken[a.arg] = _parameter(a.annotation, keyword_default, keyword_only=True)
    return taken, arguments.kwarg is not None


def _fields_take(code: Code) -> _Taken:
    """The fields of a dataclass or NamedTuple, inherited ones first."""
    taken: dict[str, Parameter] = {}
    for owner in reversed(lineage(code)):
        if not isinstance(owner.node, ast.ClassDef) or not _is_plain(owner):
            return None
        options = _dataclass_options(owner)
        keyword_only = options.get("kw_only", False)
        for node in owner.node.body if options or owner == code else ():
            match node:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=default):
                    if last_name(annotation) == "KW_ONLY":
                        keyword_only = True
                    elif last_name(annotation) != "ClassVar":
                        told = _keywords(default) if last_name(default) == "field" else {"default": default}
                        value = told.get("default") or told.get("default_factory")
                        taken[name] = _parameter(annotation, value, _truth(told.get("kw_only"), keyword_only))
                        if not _truth(told.get("init"), True):
                            del taken[name]
    return taken, False


def _dataclass_options(code: Code) -> dict[str, bool]:
    """What `@dataclass(...)` was told, with `init` always there; empty for any other class."""
    for decorator in code.node.decorator_list if isinstance(code.node, ast.ClassDef) else ():
        if origin(decorator, code.module) == "dataclasses.dataclass":
            return {"init": True} | {key: _truth(value, False) for key, value in _keywords(decorator).items()}
    return {}


def _is_plain(code: Code) -> bool:
    """A class whose decorators and metaclass leave its constructor alone."""
    assert isinstance(code.node, ast.ClassDef)
    allowed = TRANSPARENT | ({"dataclass"} if _dataclass_options(code) else set())
    metaclasses = {last_name(keyword.value) for keyword in code.node.keywords if keyword.arg == "metaclass"}
    return {*map(last_name, code.node.decorator_list)} <= allowed and metaclasses <= {"ABCMeta"}


def _parameter(annotation: ast.expr | None, default: ast.expr | None, keyword_only: bool = False) -> Parameter:
    annotation_text = ast.unparse(annotation) if annotation else None
    return Parameter(default is None, annotation_text, ast.unparse(default) if default else None, keyword_only)


def _keywords(call: ast.expr | None) -> dict[str, ast.expr | None]:
    return {keyword.arg or "": keyword.value for keyword in call.keywords} if isinstance(call, ast.Call) else {}


def _truth(node: ast.expr | None, otherwise: bool) -> bool:
    return bool(node.value) if isinstance(node, ast.Constant) else otherwise


# --- values against annotations ---


def _value_fits(parameter: Parameter, value: object) -> bool:
    if parameter.annotation is None or value == "???" or isinstance(value, Mapping):  # a mapping may build anything
        return True
    if value is None and parameter.default == "None":
        return True
    try:
        return _fits(ast.parse(parameter.annotation, mode="eval").body, value)
    except SyntaxError:
        return True


def _fits(annotation: ast.expr, value: object) -> bool:
    """False only where a plain annotation (int, float, bool, str, Literal, sequences and unions of them) forbids it."""
    match annotation:
        case ast.Constant(value=str(quoted)):
            return _fits(ast.parse(quoted, mode="eval").body, value)
        case ast.Constant(value=None):
            return value is None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(left, value) or _fits(right, value)
        case ast.Subscript(value=outer, slice=inner):
            return _fits_generic(outer, inner.elts if isinstance(inner, ast.Tuple) else [inner], value)
    match last_name(annotation):
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "bool":
            return isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case "list" | "List" | "tuple" | "Tuple":  # YAML has no tuples: its lists stand for both
            return isinstance(value, list | tuple)
        case "Sequence":
            return isinstance(value, list | tuple | str)
    return True


def _fits_generic(outer: ast.expr, options: list[ast.expr], value: object) -> bool:
    match last_name(outer):
        case "Optional":
            return value is None or _fits(options[0], value)
        case "Union":
            return any(_fits(option, value) for option in options)
        case "Annotated":
            return _fits(options[0], value)
        case "Literal":
            allowed = [option.value for option in options if isinstance(option, ast.Constant)]
            return len(allowed) < len(options) or any(type(a) is type(value) and a == value for a in allowed)
        case "list" | "List" | "tuple" | "Tuple" | "Sequence" as kind:
            if not isinstance(value, list | tuple | str) or not _fits(outer, value):
                return False
            if kind in ("tuple", "Tuple") and ast.unparse(options[-1]) != "...":
                return len(value) == len(options) and all(map(_fits, options, value))
            return all(_fits(options[0], item) for item in value)
    return True
