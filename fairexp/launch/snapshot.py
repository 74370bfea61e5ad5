"""A frozen copy of the code that a job imports, named by its content: editing code after the submission changes nothing.

Git says what is code: what it tracks, and what it neither tracks nor ignores, as it stands in the work tree. Outside a
repository the ending of a file's name says it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import fairexp
from fairexp.errors import UserError

CODE = (".py", ".pyi", ".yaml", ".yml", ".json", ".toml", ".cfg", ".txt", ".csv", ".csv.gz")
NO_CODE = ("__pycache__", "node_modules", "site-packages")
MOST_FILES = 20_000  # a home folder holds more, a repository of code fewer
MB = 1_000_000
# Each part of a path is compared, in lower case; a source file (credentials.py) is code all the same.
SECRET = re.compile(
    r"(\.env(\..*)?|.*\.env|\.envrc|[._]netrc|\.pgpass|\.pypirc|\.npmrc|\.git-credentials|.*\.(pem|key|p12|pfx|jks|kdbx)"
    r"|id_(rsa|dsa|ecdsa|ed25519).*|credentials.*|\.?secrets(\..*)?|kaggle\.json|\.aws|\.ssh|\.gnupg|\.kube|\.docker)"
)
SECRETS, LARGE, LINKS = "may hold secrets", "too large for code", "links that lead out of the repository"


@dataclass(frozen=True)
class Snapshot:
    """Where the frozen code lies, and what isn't in it."""

    id: str
    path: Path
    source: Path  # the top of what was copied
    import_paths: list[str]  # folders in `path`, in the order of sys.path
    left_out: list[str]  # for people: a line a reason
    commit: str  # "" outside a repository and before its first commit
    patch: str  # of uncommitted changes; bytes that aren't UTF-8 are surrogates


def take(runs_dir: Path, here: Path, max_mb: float, exclude: Sequence[str]) -> Snapshot:
    """The snapshot of the code around the working folder `here` and of fairexp; written only if there is none like it.

    `exclude`: globs on paths relative to the top of the repository, or to `here` where there is none. UserError: more than
    `max_mb`, or too many files. OSError: it can't be written, and nothing is left half-made.
    """
    here = here.resolve()
    top = Path(_git(here, "rev-parse", "--show-toplevel").removesuffix("\n") or here)
    listed = _listed(top) if (top / ".git").exists() else list(_walk(top))
    left: dict[str, list[str]] = defaultdict(list)
    skip = _inside(runs_dir.resolve(), top)
    names = [name for name in listed if not _below(name, skip) and not _excluded(name, exclude)]
    names = [name for name in names if _is_code(top / name, name, top, max_mb * MB / 10, left)]
    _check_size(top, names, max_mb)
    files = {f"repo/{name}": top / name for name in names}
    package = Path(fairexp.__file__).parent.resolve()
    own = _inside(package, top)
    is_ours = own is not None and f"repo/{own}/__init__.py" in files
    if not is_ours:
        files |= {f"lib/fairexp/{name}": package / name for name in _package_files(package)}
    path = _publish(files, runs_dir.absolute() / "snapshots")
    imports = [str(path / "repo" / folder) for folder in _import_folders(here, top)]
    commit = _git(top, "rev-parse", "--verify", "-q", "HEAD").strip()
    changed = _git(top, "diff", "HEAD", "--name-only", "--no-renames", "-z").split("\0") if commit else []
    kept = [name for name in changed if name in set(names) or (name and not (top / name).exists() and not _secret(name))]
    return Snapshot(
        id=path.name,
        path=path,
        source=top,
        import_paths=imports if is_ours else [*imports, str(path / "lib")],
        left_out=[f"{_some(group)}: {reason}" for reason, group in left.items()],
        commit=commit,
        patch=_git(top, "diff", "HEAD", "--binary", "--no-ext-diff", "--", *kept) if kept else "",
    )


# --- which files are code ---


def _git(folder: Path, *words: str) -> str:
    """What git says; "" where it fails: no repository, another user's, no git. Git's variables (of a hook) don't mislead it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "--literal-pathspecs", "-c", "core.quotePath=false", *words]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return os.fsdecode(done.stdout) if done.returncode == 0 else ""


def _listed(top: Path) -> list[str]:
    """What git tracks, submodules too, and what it neither tracks nor ignores."""
    tracked = _git(top, "ls-files", "-z", "--cached", "--recurse-submodules")
    others = _git(top, "ls-files", "-z", "--others", "--exclude-standard")
    return sorted({name for name in (tracked + others).split("\0") if name and not name.endswith("/")})


def _walk(top: Path) -> Iterator[str]:
    """The files below a folder without git that look like code."""
    seen = 0
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in NO_CODE and not (Path(folder) / name / "pyvenv.cfg").exists()
        )
        seen += len(folders) + len(files)
        if seen > MOST_FILES:
            raise UserError(
                f"{top} holds over {MOST_FILES:,} files, too many for a copy of the code; "
                "run from your project's folder, or put it under git, which knows what is code"
            )
        for name in sorted(files):
            if name.endswith(CODE):
                yield os.path.relpath(os.path.join(folder, name), top)


def _inside(path: Path, top: Path) -> str | None:
    """The path relative to the top; None if it doesn't lie in it."""
    return path.relative_to(top).as_posix() if path.is_relative_to(top) and path != top else None


def _below(name: str, folder: str | None) -> bool:
    return folder is not None and f"{name}/".startswith(f"{folder}/")


def _excluded(name: str, exclude: Sequence[str]) -> bool:
    parts = name.split("/")
    prefixes = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    return any(fnmatch(prefix, pattern) for prefix in prefixes for pattern in exclude)


def _secret(name: str) -> bool:
    parts = name.lower().split("/")
    return any(SECRET.fullmatch(part) for part in parts) and not parts[-1].endswith((".py", ".pyi"))


def _is_code(path: Path, name: str, top: Path, largest: float, left: dict[str, list[str]]) -> bool:
    """Whether a file is copied; notes in `left` why not."""
    try:
        found = path.lstat()
    except OSError:  # tracked, and deleted from the work tree
        return False
    if stat.S_ISLNK(found.st_mode):
        target = os.readlink(path)
        if os.path.isabs(target) or not Path(os.path.realpath(path)).is_relative_to(top):
            left[LINKS].append(name)
            return False
        return True
    if not stat.S_ISREG(found.st_mode):
        return False
    if _secret(name):
        left[SECRETS].append(name)
        return False
    if found.st_size > largest:
        left[LARGE].append(f"{name} ({found.st_size / MB:,.0f} MB)")
        return False
    return True


def _check_size(top: Path, names: Sequence[str], max_mb: float) -> None:
    sizes = {name: (top / name).lstat().st_size for name in names}
    total = sum(sizes.values())
    if total <= max_mb * MB:
        return
    folders: Counter[str] = Counter()
    for name, size in sizes.items():
        folders[name.partition("/")[0]] += size
    largest = ", ".join(f"{name} {size / MB:,.0f} MB" for name, size in folders.most_common(3))
    raise UserError(
        f"{top}: its code has {total / MB:,.0f} MB, and launcher.snapshot_max_mb is {max_mb:g}; largest: {largest}. "
        "Let git ignore what isn't code, or name it in launcher.snapshot_exclude"
    )


def _package_files(package: Path) -> list[str]:
    """fairexp's own files, where it is installed elsewhere."""
    found = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.relative_to(package).as_posix() for path in found)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]).encode(errors="replace").decode() + more


# --- where it is imported from ---


def _import_folders(here: Path, top: Path) -> list[str]:
    """The folders of the repository that this process imports from, relative to its top, the working folder first: those of
    sys.path, and those that setuptools' editable installs map."""
    folders = [here, *(Path(entry or here).resolve() for entry in sys.path)]
    for name, module in list(sys.modules.items()):
        if name.startswith("__editable___"):
            mapping: Mapping[str, str] = getattr(module, "MAPPING", {})
            folders += [Path(folder).resolve().parent for package, folder in mapping.items() if Path(folder).name == package]
    found = [folder.relative_to(top).as_posix() for folder in folders if folder.is_relative_to(top) and folder.is_dir()]
    return list(dict.fromkeys(folder for folder in found if "site-packages" not in folder.split("/")))


# --- the copy ---


def _publish(files: Mapping[str, Path], snapshots: Path) -> Path:
    """Copies the files into a folder that is named by their content and appears whole; nothing is done if it is there."""
    final = snapshots / _digest(files)
    if final.is_dir():
        return final
    draft = snapshots / f".draft.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        for name, source in files.items():
            copy = draft / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                copy.symlink_to(os.readlink(source))
            else:
                shutil.copyfile(source, copy)
                copy.chmod(0o555 if source.stat().st_mode & stat.S_IXUSR else 0o444)  # nobody edits it by accident
        # a file that was edited meanwhile: the name is that of what was copied
        final = snapshots / _digest({name: draft / name for name in files})
        draft.rename(final)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not final.is_dir():  # else another process was faster
            raise
    return final


def _digest(files: Mapping[str, Path]) -> str:
    """16 hex digits of the SHA-256 of names, executable bits, link targets and contents."""
    whole = hashlib.sha256()
    for name, path in sorted(files.items()):
        if path.is_symlink():
            kind, content = b"l", os.fsencode(os.readlink(path))
        else:
            kind, content = (b"x" if path.stat().st_mode & stat.S_IXUSR else b"f"), path.read_bytes()
        whole.update(b"%b\0%b\0%b\n" % (os.fsencode(name), kind, hashlib.sha256(content).digest()))
    return whole.hexdigest()[:16]
