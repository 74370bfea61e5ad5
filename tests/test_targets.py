"""What a target takes is read from source: nothing is imported, wrong names are found, doubt is accepted."""

import subprocess
import sys
import textwrap
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import pytest

from fairexp.config.targets import Parameter, Signature, TargetError, check_arguments, find

# Importing any of this would fail: it raises, or imports what isn't installed.
FILES = {
    "zoo/__init__.py": """\
        from .models import ViT as ViT, Small
        from .models.vit import *
        from . import functions as f
        import zoo.records as rec
        import zoo.models.vit as v
        raise SystemExit("imported")
    """,
    "zoo/models/__init__.py": "from .vit import ViT\nfrom zoo.models.vit import Tiny as Small\n",
    "zoo/models/vit.py": """\
        from typing import Generic, Literal, Sequence, TypeVar
        import elsewhere
        __all__ = ["ViT", "Alias"]
        T = TypeVar("T")
        class ViT(elsewhere.Module):
            def __init__(self, image_size: int, patch_size=16, *, width: int = 384, pool: Literal["cls"] = "cls"):
                pass
            @classmethod
            def from_name(cls, name: str, pretrained=False): ...
            @staticmethod
            def parse(text, /, strict=True): ...
            class Head:
                def __init__(self, classes): ...
            narrow = from_name
        class Tiny(ViT): pass
        class Wide(ViT):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
        class Unreachable(elsewhere.Module): pass
        Alias = Tiny
        hidden = 1
    """,
    "zoo/functions.py": """\
        import functools
        import torch
        from contextlib import contextmanager
        from typing import overload
        from somewhere import traced
        @overload
        def loaded(a: int): ...
        @overload
        def loaded(a: str, b: int): ...
        def loaded(a, b=1): ...
        @torch.no_grad()
        def quiet(x, scale: float = 1.0): ...
        @contextmanager
        def timer(name): yield
        @traced
        def unknown(a): ...
        @functools.cache
        def cached(n): ...
        async def later(url): ...
        half = functools.partial(quiet, scale=0.5)
    """,
    "zoo/records.py": """\
        import dataclasses
        from dataclasses import KW_ONLY, InitVar, dataclass, field
        from typing import ClassVar, NamedTuple
        from pydantic.dataclasses import dataclass as checked
        @dataclass
        class Base:
            a: int
            kind: ClassVar[str] = "x"
            b: list[int] = field(default_factory=list)
            made: int = field(init=False)
        @dataclasses.dataclass(frozen=True)
        class Derived(Base):
            _: KW_ONLY
            c: InitVar[float] = 0.5
            a: int = 3
        @dataclass(init=False)
        class Handmade(Base):
            def __init__(self, x): ...
        @dataclass(kw_only=True)
        class Keywords:
            k: str
        class Plain(Derived): pass
        class Point(NamedTuple):
            x: float
            y: float = 0.0
        @checked
        class Checked:
            n: int
    """,
    "zoo/branches.py": """\
        import sys
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from zoo.models.vit import ViT
        try:
            from not_installed import Fast
        except ImportError:
            Fast = None
        try:
            from not_installed import Model
        except ImportError:
            from zoo.models import ViT as Model
        if sys.version_info >= (3, 12):
            def choose(a): ...
        else:
            def choose(b): ...
        match sys.platform:
            case "linux":
                def on_linux(a): ...
        with open("x"):
            def inside(a): ...
        for name in ("x",):
            pass
        def gone(): ...
        del gone
    """,
    "zoo/lineage.py": """\
        from abc import ABC, ABCMeta
        from typing import Generic, Protocol, TypeVar
        from zoo.models import Tiny as Linear
        T = TypeVar("T")
        class Root(ABC):
            def __init__(self, root): ...
        class Left(Root): pass
        class Right(Root):
            def __init__(self, right): ...
        class Diamond(Left, Right): pass
        class Typed(Generic[T], metaclass=ABCMeta):
            def __init__(self, t: T): ...
        class OfInt(Typed[int]): pass
        class Made:
            def __new__(cls, made=1): ...
        class Nothing: pass
        class Counted(dict): pass
        class Linear(Linear): pass
        class Meta(type): pass
        class WithMeta(metaclass=Meta):
            def __init__(self, a): ...
        class Branching:
            if True:
                def __init__(self, a): ...
            else:
                def __init__(self, b): ...
    """,
    "zoo/lazy.py": "def __getattr__(name): ...\n",
    "zoo/computed.py": "for n in 'ab':\n    globals()[n] = dict\n",
    "zoo/starry.py": "from not_installed import *\n",
    "zoo/inside_c.py": "from math.inner import thing\n",
    "zoo/listed.py": "__all__ = ['seen']\ndef seen(): ...\ndef unseen(): ...\n",
    "zoo/grown.py": "__all__ = ['seen']\ndef seen(): ...\ndef later(a): ...\n__all__ += ['later']\n",
    "zoo/stars.py": "from .listed import *\nfrom .grown import *\n",
    "zoo/broken.py": "def f(:\n",
    "zoo/latin.py": "# -*- coding: latin-1 -*-\ndef café(x='\xe9'): ...\n",
    "zoo/escapes.py": "def f(pattern='\\d'): ...\n",
    "zoo/dangling.py": "from .models import Nobody\nfrom .nowhere import Nothing\n",
    "cycle/__init__.py": "from cycle.one import A\nfrom cycle.two import *\n",
    "cycle/one.py": "from cycle.two import B\nfrom cycle import A as Again\nclass A:\n    def __init__(self, a): ...\n",
    "cycle/two.py": "from cycle.one import B\nfrom cycle import *\n",
    "spaces/inner/deep/leaf.py": "def grow(height): ...\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("mes modèles à moi")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        encoding = "latin-1" if name == "zoo/latin.py" else "utf-8"
        (root / name).write_text(textwrap.dedent(text), encoding=encoding)
    return str(root)


def takes(signature: Signature) -> str:
    """As text: `!` behind what is required, `*` before what is keyword-only, `...` for **kwargs."""
    if signature.unknown:
        return "unknown"
    texts = ["*" * p.keyword_only + name + "!" * p.required for name, p in signature.parameters.items()]
    return ", ".join([*texts, *["..."] * signature.takes_any])


VIT = "image_size!, patch_size, *width, *pool"
TAKES = {
    "zoo.models.vit.ViT": VIT,
    "zoo.models.ViT": VIT,
    "zoo.ViT": VIT,
    "zoo.Small": VIT,
    "zoo.Alias": VIT,
    "zoo.v.Tiny": VIT,
    "zoo.ViT.from_name": "name!, pretrained",
    "zoo.Small.from_name": "name!, pretrained",
    "zoo.ViT.narrow": "unknown",  # a name of the class body, not of the module
    "zoo.ViT.parse": "strict",
    "zoo.ViT.Head": "classes!",
    "zoo.ViT.from_name.__func__": "unknown",
    "zoo.models.vit.Wide": "...",
    "zoo.models.vit.Unreachable": "unknown",
    "zoo.models.vit.hidden": "unknown",
    "zoo.f.loaded": "a!, b",
    "zoo.functions.quiet": "x!, scale",
    "zoo.functions.timer": "name!",
    "zoo.functions.unknown": "unknown",
    "zoo.functions.cached": "n!",
    "zoo.functions.later": "url!",
    "zoo.functions.half": "unknown",
    "zoo.rec.Base": "a!, b",
    "zoo.records.Derived": "*a, b, *c",  # declared again behind KW_ONLY, at its old place
    "zoo.records.Plain": "*a, b, *c",
    "zoo.records.Handmade": "x!",
    "zoo.records.Keywords": "*k!",
    "zoo.records.Point": "x!, y",
    "zoo.records.Checked": "unknown",
    "zoo.branches.ViT": VIT,
    "zoo.branches.Fast": "unknown",
    "zoo.branches.Model": VIT,
    "zoo.branches.choose": "unknown",
    "zoo.branches.on_linux": "a!",
    "zoo.branches.inside": "a!",
    "zoo.branches.name": "unknown",
    "zoo.lineage.Diamond": "right!",
    "zoo.lineage.OfInt": "t!",
    "zoo.lineage.Made": "made",
    "zoo.lineage.Nothing": "",
    "zoo.lineage.Counted": "unknown",
    "zoo.lineage.Linear": "unknown",
    "zoo.lineage.WithMeta": "unknown",
    "zoo.lineage.Branching": "unknown",
    "zoo.lazy.anything": "unknown",
    "zoo.computed.a": "unknown",
    "zoo.starry.Thing": "unknown",
    "zoo.inside_c.thing": "unknown",
    "zoo.stars.later": "a!",
    "zoo.latin.café": "x",
    "zoo.escapes.f": "pattern",
    "cycle.A": "a!",
    "cycle.one.Again": "a!",
    "cycle.two.B": "unknown",
    "spaces.inner.deep.leaf.grow": "height!",
}


@pytest.mark.parametrize("dotted", TAKES)
def test_the_arguments_are_those_in_the_source(dotted: str, folder: str) -> None:
    assert takes(find(dotted, [folder])) == TAKES[dotted]


INSTALLED = {
    "torch.optim.AdamW": "params!, lr, betas, eps, weight_decay",
    "torch.optim.SGD": "params!, lr, momentum",
    "torch.optim.Muon": "params!, lr, weight_decay",
    "torch.nn.Linear": "in_features!, out_features!, bias, device, dtype",
    "torch.nn.Sequential": "",
    "torch.nn.Identity": "...",
    "torch.nn.TransformerEncoderLayer": "d_model!, nhead!, dim_feedforward",
    "torch.optim.lr_scheduler.OneCycleLR": "optimizer!, max_lr!, total_steps",
    "wandb.init": "entity, project, dir",
    "torch.tensor": "unknown",
    "numpy.linspace": "unknown",
    "functools.partial": "unknown",
    "builtins.dict": "unknown",
    "math.sqrt": "unknown",
}


def test_installed_packages_are_read_without_being_imported() -> None:
    program = f"""
import sys
from fairexp.config.targets import find
for dotted in {list(INSTALLED)}:
    found = find(dotted)
    texts = ["*" * p.keyword_only + name + "!" * p.required for name, p in found.parameters.items()]
    print("unknown" if found.unknown else ", ".join([*texts, *["..."] * found.takes_any]))
print(sorted({{"torch", "numpy", "wandb"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *found, imported = ran.stdout.split("\n")[:-1]
    assert [
        text for text, expected in zip(found, INSTALLED.values(), strict=True) if not text.startswith(expected)
    ] == []
    assert imported == "[]"


ERRORS = {
    "ViT": "'ViT' is not a dotted name such as torch.optim.AdamW",
    "zoo.models.ViT-B": "'zoo.models.ViT-B' is not a dotted name such as torch.optim.AdamW",
    "zoom.models.ViT": "no module named 'zoom'; nearest: zoo",
    "zoo.modles.ViT": "no module named 'zoo.modles'; nearest: zoo.models",
    "spaces.iner.x": "no module named 'spaces.iner'; nearest: spaces.inner",
    "zoo.models.VIT": "zoo.models has no VIT; nearest: ViT",
    "zoo.models.vit": "zoo.models.vit is a module, not a class or function; nearest: zoo.models.vit.ViT",
    "zoo.models.vit.Tinny": "zoo.models.vit has no Tinny; nearest: Tiny",
    "zoo.stars.unseen": "zoo.stars has no unseen; nearest: seen",
    "zoo.branches.gone": "zoo.branches has no gone",
    "zoo.lineage.Right.__init": "Right has no __init; nearest: __init__",
    "zoo.dangling.Nobody": "zoo.models has no Nobody",
    "torch.optim.AdamX": "torch.optim has no AdamX; nearest: Adam, AdamW, Adamax",
    "torch.optim.lr_schedulr.StepLR": "no module named 'torch.optim.lr_schedulr'; nearest: torch.optim.lr_scheduler",
}


@pytest.mark.parametrize("dotted", ERRORS)
def test_a_name_that_is_not_there_is_an_error_with_the_nearest(dotted: str, folder: str) -> None:
    with pytest.raises(TargetError) as error:
        find(dotted, [folder])
    assert str(error.value) == ERRORS[dotted]


def test_a_file_that_does_not_parse_is_named_with_its_line(folder: str) -> None:
    with pytest.raises(TargetError, match=r"broken\.py:1: "):
        find("zoo.broken.f", [folder])


def test_a_missing_module_names_the_file_that_imports_it(folder: str) -> None:
    with pytest.raises(TargetError, match=r"no module named 'zoo\.nowhere', which .*dangling\.py imports"):
        find("zoo.dangling.Nothing", [folder])


def test_a_signature_knows_its_file_line_annotations_and_defaults(folder: str) -> None:
    found = find("zoo.ViT", [folder])
    assert (found.name, Path(found.file or "").name, found.line) == ("ViT", "vit.py", 5)
    assert found.parameters["image_size"] == Parameter(required=True, annotation="int", default=None)
    assert found.parameters["pool"] == Parameter(False, "Literal['cls']", "'cls'", keyword_only=True)


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    for text in ("def f(a): ...", "def f(a, b): ..."):
        (tmp_path / "edited.py").write_text(text)
        found = find("edited.f", [str(tmp_path)])
    assert takes(found) == "a!, b!"


def test_an_editable_install_is_found_through_its_finder(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:  # what setuptools writes: only it knows where the package lies
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            return PathFinder.find_spec("zoo", [folder]) if name == "zoo" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert takes(find("zoo.models.ViT")) == VIT


PARAMETERS = {
    "image_size": Parameter(True, "int", None),
    "patch_size": Parameter(False, "int", "16"),
    "params": Parameter(True, None, None),
}
VIT_SIGNATURE = Signature("ViT", "vit.py", 3, PARAMETERS)
GIVEN: dict[str, tuple[dict[str, object], list[str]]] = {
    "all is well": ({"image_size": 224, "params": 1}, []),
    "the runtime provides params": ({"image_size": 224}, ["ViT needs 'params'"]),
    "Hydra's own keys": (
        {"image_size": 8, "params": 0, "_target_": "x", "_partial_": False, "_convert_": "all", "_recursive_": True},
        [],
    ),
    "positions fill what is required": ({"_args_": [224, []]}, []),
    "a partial is completed later": ({"_partial_": True}, []),
    "an unexpected argument": (
        {"image_size": 1, "params": 1, "path_size": 16},
        ["ViT takes no 'path_size'; nearest: patch_size, image_size; it takes: image_size, patch_size, params"],
    ),
    "several problems at once": (
        {"patch_size": "four", "zzz": 1},
        [
            "ViT: 'patch_size' takes int, got 'four'",
            "ViT takes no 'zzz'; it takes: image_size, patch_size, params",
            "ViT needs 'image_size'",
            "ViT needs 'params'",
        ],
    ),
}


@pytest.mark.parametrize("case", GIVEN)
def test_wrong_arguments_are_all_told_at_once(case: str) -> None:
    given, problems = GIVEN[case]
    assert check_arguments(VIT_SIGNATURE, given, ()) == problems


def test_what_the_runtime_provides_is_not_missing() -> None:
    assert check_arguments(VIT_SIGNATURE, {"image_size": 224}, ["params"]) == []


def test_kwargs_take_any_name_and_an_unknown_signature_takes_anything() -> None:
    assert check_arguments(Signature("f", None, None, takes_any=True), {"x": 1}, ()) == []
    assert check_arguments(Signature("f", None, None, unknown=True), {"x": 1}, ()) == []
    assert check_arguments(Signature("f", None, None), {"x": 1}, ()) == ["f takes no 'x'; it takes no named arguments"]


FITS: Mapping[str, tuple[list[object], list[object]]] = {  # annotation: what fits, what doesn't
    "int": ([1, -1], [True, 1.0, "four", None, [1]]),
    "float": ([1.5, 1], [True, "1e-3", None]),
    "bool": ([True], [1, "yes"]),
    "str": (["x", ""], [1, None]),
    "int | None": ([1, None], ["x", True]),
    "Optional[float]": ([None, 2], ["x"]),
    "typing.Union[int, str]": ([1, "x"], [1.5]),
    "Literal['cls', 'mean', 1]": (["cls", 1], ["max", True, None]),
    "Annotated[int, 'units: px']": ([1], ["x"]),
    "list[int]": ([[], [1, 2]], [1, ["a"], "ab"]),
    "Sequence[float]": ([[1, 2.5], (1,)], [["a"], "ab", 1]),
    "Sequence[str]": ([["a"], "ab"], [[1]]),
    "tuple[float, float]": ([[0.9, 0.95]], [[0.9], [0.9, "x"], 0.9]),
    "tuple[int, ...]": ([[], [1, 2, 3]], [["x"]]),
    "list": ([[1, "x"]], ["x", 1]),
    "'int | None'": ([1, None], ["x"]),
    "float | Tensor": ([1, "anything"], []),
    "list[Tensor | int]": ([["x"]], ["x"]),
    "Callable[[int], str]": (["x", 1], []),
    "int if x else str": (["x", 1], []),
}


@pytest.mark.parametrize("annotation", FITS)
def test_values_are_held_against_plain_annotations_only(annotation: str) -> None:
    signature = Signature("f", None, None, {"x": Parameter(True, annotation, None)})
    good, bad = FITS[annotation]
    assert [value for value in good if check_arguments(signature, {"x": value}, ())] == []
    assert [value for value in bad if not check_arguments(signature, {"x": value}, ())] == []


def test_none_fits_where_it_is_the_default_and_open_or_built_values_are_left_alone() -> None:
    signature = Signature("f", None, None, {"x": Parameter(False, "int", "None")})
    assert [v for v in (None, "???", {"_target_": "a.b"}) if check_arguments(signature, {"x": v}, ())] == []
