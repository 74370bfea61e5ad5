"""A frozen copy of the code that a job imports, named by its content: editing code after the submission changes nothing.

Git says what is code: what it tracks, and what it neither tracks nor ignores, as it stands in the work tree. Outside a
repository the ending of a file's name says it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import translate
from io import FileIO
from itertools import accumulate, islice
from pathlib import Path

import fairexp
from fairexp.errors import UserError

CODE = ("*.py", "*.pyi", "*.yaml", "*.yml", "*.json", "*.toml", "*.cfg", "*.txt", "*.csv", "*.csv.gz")
CODE_NAME = re.compile("|".join(map(translate, CODE)))
NO_CODE = ("node_modules", "site-packages")  # folders of other people's code, unless they are tracked
VIRTUAL = ("pyvenv.cfg", "conda-meta")  # what marks the folder of an environment
VIRTUAL_MARK = re.compile(r"(.+?)/(?:pyvenv\.cfg|conda-meta/.*)", re.DOTALL)
MOST_FILES = 20_000  # a home folder holds more, a repository of code fewer
MOST_PATHSPECS = 1_000  # a command line has its limit, too
GIT_TIMEOUT_S = 60
OURS_IN_RUNS = ("snapshots", "submissions", "sweeps")
MB = 1_000_000


def _part_of_path(*globs: str) -> re.Pattern[str]:
    either = "|".join(re.escape(glob).replace(r"\*", "[^/]*") for glob in globs)
    return re.compile(rf"/(?:{either})(?:/|\Z)")


# Names of files and folders, in lower case. Credentials.py is code all the same; nothing in .ssh is.
SECRET_NAME = _part_of_path(
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".git-credentials"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
    *("credentials*", "secrets", "secrets.*", ".secrets", ".secrets.*", "kaggle.json"),
)
SECRET_PLACE = _part_of_path(
    ".aws", ".ssh", ".gnupg", ".kube", ".docker/config.json", ".wandb*/settings", "wandb/settings"
)

SECRET = "files that may hold secrets"
LINKS = "links that are absolute or lead out of the folder"
UNREADABLE = "what can't be read"
RENAMED = "packages that are installed from a folder of another name, which jobs import as it is when they start"
MODULES = "modules beside the copied ones that are compiled, or ignored by git"
PATCH = "the patch of uncommitted changes"


@dataclass(frozen=True)
class Snapshot:
    """Where the frozen code lies, and what isn't in it."""

    id: str
    path: Path
    source: Path  # the top of what was copied
    import_paths: list[str]  # folders in `path`, in the order of sys.path
    left_out: list[str]  # for people: a line a reason
    commit: str  # "" outside a repository and before its first commit
    patch: str  # of uncommitted changes to tracked files; bytes that aren't UTF-8 are surrogates


def take(runs_dir: Path, here: Path, max_mb: float, exclude: Sequence[str]) -> Snapshot:
    """The snapshot of the code around the working folder `here` and of fairexp; written only if there is none like it.

    `exclude`: globs on paths relative to the top of the repository, or to `here` where there is none. UserError: more than
    `max_mb`, or too many files. OSError: it can't be written, and nothing is left half-made.
    """
    here = here.resolve()
    package = Path(fairexp.__file__).parent.resolve()
    left: dict[str, list[str]] = defaultdict(list)
    found = _repository(here, left)
    top, commit = found or (here, "")
    runs = _runs(runs_dir.resolve(), here, top)
    tree = _Tree(top, runs, _any_of(exclude), _within(package, top), max_mb * MB / 10, left)
    sizes = tree.select(tree.listed(here) if found else tree.walk(""))
    _check_size(sizes, max_mb, tree)
    tree.note_modules(sizes)
    files = {f"repo/{name}": f"{top}/{name}" for name in sizes}
    uses_lib = tree.package is None or f"{tree.package}/__init__.py" not in sizes
    if uses_lib:
        files |= {f"lib/fairexp/{name}": os.path.realpath(package / name) for name in _package_files(package)}
    seals = _seals(files, left)
    snapshots = runs_dir.absolute() / "snapshots"
    if not (snapshots / _id(seals)).is_dir():
        seals = _publish({name: files[name] for name in seals}, snapshots, left)
    path = snapshots / _id(seals)
    import_paths = [str(path / "repo" / folder) for folder in _import_folders(here, sizes, tree, uses_lib)]
    return Snapshot(
        id=path.name,
        path=path,
        source=top,
        import_paths=[*import_paths, str(path / "lib")] if uses_lib else import_paths,
        commit=commit,
        patch=_patch(tree, sizes, max_mb) if commit else "",
        left_out=[f"{reason}: {_some(names)}" for reason, names in left.items()],  # last: the lines above add to it
    )


# --- which files are code


@dataclass(frozen=True)
class _Tree:
    """The folder that is copied, and what stays out of the copy. Names are paths relative to `top`, with slashes."""

    top: Path
    runs: frozenset[str]
    exclude: re.Pattern[str] | None
    package: str | None  # fairexp's, if it lies in `top`
    largest: float  # bytes
    left: dict[str, list[str]]  # reason -> names
    links: dict[str, bool] = field(default_factory=dict)

    def listed(self, here: Path) -> list[str]:
        """What git lists, and `here` in any case: it may be a scratch folder that git ignores, but it is what the user runs."""
        names = self.listed_below("")
        folder = _within(here, self.top)
        if folder and not any(name.startswith(f"{folder}/") for name in names):
            names += self.walk(folder)
        return names

    def listed_below(self, folder: str) -> list[str]:
        """What git lists of the repository in that folder and of those nested in it: seen from above, git lists no new files
        of a submodule and nothing of a clone that is neither tracked nor ignored."""
        where, below = self.top / folder, f"{folder}/" if folder else ""
        tracked = _git(where, "ls-files", "-z", "--stage")
        untracked = _git(where, "ls-files", "-z", "--others", "--exclude-standard")
        if tracked.returncode or untracked.returncode:
            self.left[_no_git(where)].append(_said(tracked if tracked.returncode else untracked))
            return self.walk(folder)
        names: list[str] = []
        nested: list[str] = []
        for entry in _fields(tracked.stdout):
            mode, _, name = entry.partition("\t")
            (nested if mode.startswith("160000 ") else names).append(name)
        others = _fields(untracked.stdout)
        virtual = {found[1] for name in others if (found := VIRTUAL_MARK.fullmatch(name))}
        for name in others:
            if not any(part in virtual or _last(part) in NO_CODE for part in _prefixes(name)):
                (nested if name.endswith("/") else names).append(name.rstrip("/"))
        names = [below + name for name in dict.fromkeys(names)]  # a file in conflict is listed several times
        for name in nested:
            if not self.is_dropped(below + name) and _is_repository(where / name):
                names += self.listed_below(below + name)
        return names

    def walk(self, folder: str) -> list[str]:
        """The files of a folder whose endings are those of code."""
        names: list[str] = []
        folders, seen = [folder], 0
        while folders:
            current = folders.pop()
            try:
                with os.scandir(self.top / current) as found:
                    entries = list(islice(found, MOST_FILES + 1 - seen))
            except (PermissionError, FileNotFoundError):
                self.left[UNREADABLE].append(f"{current}/")
                continue
            if current != folder and any(entry.name in VIRTUAL for entry in entries):
                continue
            if current != folder and {".lock", "submissions"} <= {entry.name for entry in entries}:
                continue  # another folder of runs
            seen += len(entries)
            if seen > MOST_FILES:
                raise UserError(
                    f"launcher.snapshot_exclude: {self.top / folder} holds more than {MOST_FILES:,} files: work in a folder of "
                    "the project's own, `git init` it and ignore what isn't code, or exclude that"
                )
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{current}/{entry.name}" if current else entry.name
                if entry.is_dir(follow_symlinks=False):
                    if not (entry.name.startswith(".") or entry.name in NO_CODE or self.is_dropped(name)):
                        folders.append(name)
                elif CODE_NAME.match(entry.name) or (entry.is_symlink() and os.path.isdir(entry.path)):
                    names.append(name)
        return names

    def is_dropped(self, name: str) -> bool:
        """Whether it holds runs or bytecode, or is excluded; fairexp's own code can't be."""
        for part in _prefixes(name):
            if part in self.runs or _last(part) == "__pycache__":
                return True
            if self.exclude and self.exclude.match(part) and not self.is_ours(name):
                return True
        return False

    def stays_out(self, name: str) -> bool:
        """Of a name that isn't copied: whether it must not be, and hasn't just been deleted."""
        path = self.top / name
        return self.is_dropped(name) or _is_secret(name) or (os.path.lexists(path) and not os.path.isdir(path))

    def is_ours(self, name: str) -> bool:
        """Whether it belongs to fairexp's package, or is a folder around that."""
        ours = self.package
        return ours is not None and (f"{name}/".startswith(f"{ours}/") or ours.startswith(f"{name}/"))

    def select(self, names: Sequence[str]) -> dict[str, int]:
        """The files that are copied, with their sizes in bytes; what is left out is noted."""
        sizes: dict[str, int] = {}
        for name in names:
            if self.is_dropped(name) or self.is_behind_link(name):
                continue
            try:
                status = os.lstat(f"{self.top}/{name}")
            except (FileNotFoundError, NotADirectoryError):  # deleted, and git hasn't been told
                continue
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
                continue
            if _is_secret(name):
                self.left[SECRET].append(name)
            elif stat.S_ISLNK(status.st_mode) and self.leads_out(name):
                self.left[LINKS].append(f"{name} -> {os.readlink(self.top / name)}")
            elif status.st_size > self.largest and not self.is_ours(name):
                self.left[f"files over {_mb(self.largest)}, a tenth of launcher.snapshot_max_mb"].append(
                    f"{name} ({_mb(status.st_size)})"
                )
            else:
                sizes[name] = status.st_size
        if len(sizes) > MOST_FILES:
            raise UserError(
                f"launcher.snapshot_exclude: {self.top} holds {len(sizes):,} files that git doesn't ignore, more than "
                f"{MOST_FILES:,}; the most: {_biggest(dict.fromkeys(sizes, 1), '{:,}'.format)}; ignore or exclude what isn't code"
            )
        return sizes

    def note_modules(self, files: Mapping[str, int]) -> None:
        """Notes the modules beside the copied ones that aren't copied, since an import may miss them: a version file that a
        build has written, a compiled extension."""
        for folder in dict.fromkeys(name.rpartition("/")[0] for name in files if name.endswith(".py")):
            for entry in os.scandir(self.top / folder):
                name = f"{folder}/{entry.name}" if folder else entry.name
                is_module = name.endswith((".py", ".so")) and entry.is_file(follow_symlinks=False)
                if is_module and name not in files and not entry.name.startswith(".") and not self.is_dropped(name):
                    self.left[MODULES].append(name)

    def is_behind_link(self, name: str) -> bool:
        """Whether a folder on the way is a link now: git's index still lists what was there before."""
        folder = name.rpartition("/")[0]
        if folder and folder not in self.links:
            self.links[folder] = os.path.islink(self.top / folder) or self.is_behind_link(folder)
        return bool(folder) and self.links[folder]

    def leads_out(self, name: str) -> bool:
        """Whether the link would lead out of the snapshot, to what isn't frozen."""
        target = os.readlink(self.top / name)
        as_written = os.path.normpath(os.path.join(os.path.dirname(name), target))
        in_the_end = Path(os.path.realpath(self.top / name))
        return os.path.isabs(target) or as_written.split("/")[0] == ".." or not in_the_end.is_relative_to(self.top)


def _is_repository(folder: Path) -> bool:
    """Whether a nested folder is a submodule or a clone, and no other work tree of the repository around it."""
    mark = folder / ".git"
    if mark.is_file():
        return not re.search(rb"/worktrees/[^/]+\Z", mark.read_bytes().strip())
    return mark.is_dir()


def _runs(runs_dir: Path, here: Path, top: Path) -> frozenset[str]:
    """The folders of `top` that hold runs and no code: `runs_dir`, unless the working folder lies in it."""
    folders = [runs_dir]
    if here.is_relative_to(runs_dir):
        folders = [
            *(runs_dir / name for name in OURS_IN_RUNS),
            *(file.parent for file in runs_dir.glob("*/status.json")),
        ]
    return frozenset(name for folder in folders if (name := _within(folder, top)))


def _any_of(globs: Sequence[str]) -> re.Pattern[str] | None:
    """`data/` means the folder, and `**/x` also an x at the top."""
    clean = [glob.removeprefix("./").strip("/") for glob in globs]
    clean += [glob.removeprefix("**/") for glob in clean]
    return re.compile("|".join(translate(glob) for glob in clean if glob)) if any(clean) else None


def _within(path: Path, top: Path) -> str | None:
    """The path's name in `top`; None for `top` itself and outside."""
    return path.relative_to(top).as_posix() if path != top and path.is_relative_to(top) else None


def _prefixes(name: str) -> list[str]:
    """`a`, `a/b`, `a/b/c` of `a/b/c`."""
    return list(accumulate(name.rstrip("/").split("/"), "{}/{}".format))


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _is_secret(name: str) -> bool:
    path = f"/{name.lower()}"
    if SECRET_PLACE.search(path):
        return True
    return not path.endswith((".py", ".pyi")) and SECRET_NAME.search(path) is not None


def _package_files(package: Path) -> Iterator[str]:
    """fairexp's own files, relative to its folder."""
    for folder, folders, files in os.walk(package):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (os.path.relpath(os.path.join(folder, name), package) for name in files)


def _import_folders(here: Path, files: Mapping[str, int], tree: _Tree, uses_lib: bool) -> list[str]:
    """The folders of the tree that modules are imported from, `here` first; "" is the top."""
    folders = {part for name in files for part in _prefixes(name)}
    found = [_within(here, tree.top) or ""]
    for entry in sys.path:
        path = (here / entry).resolve()
        name = _within(path, tree.top)
        if path == tree.top:
            found.append("")
        elif name in folders and not {"site-packages", "dist-packages"} & set(path.parts):
            found.append(name)
    for package, folder in _editable():
        name = _within(folder, tree.top)
        if name is None or not (name in folders or f"{name}.py" in folders):
            continue
        if f"/{name}".endswith(inside := "/" + package.replace(".", "/")):
            found.append(f"/{name}".removesuffix(inside).strip("/"))
        elif package.partition(".")[0] != "fairexp":  # fairexp.configs, in a checkout, is read at submission only
            tree.left[RENAMED].append(f"{package} ({name})")
    if not uses_lib and tree.package:
        found.append(tree.package.rpartition("/")[0])
    return list(dict.fromkeys(found))


def _editable() -> Iterator[tuple[str, Path]]:
    """The packages that setuptools has installed in editable mode with a finder in place of an entry of sys.path."""
    for name, module in list(sys.modules.items()):
        if name.startswith("__editable___"):
            for package, folder in getattr(module, "MAPPING", {}).items():
                yield package, Path(folder).resolve()


# --- git


def _repository(here: Path, left: dict[str, list[str]]) -> tuple[Path, str] | None:
    """The top of the work tree around `here` and its commit, "" before the first; None where git knows of none."""
    try:
        ended = _git(here, "rev-parse", "--show-toplevel", "--verify", "--quiet", "HEAD")
    except (FileNotFoundError, PermissionError):
        if any((folder / ".git").exists() for folder in (here, *here.parents)):
            left[_no_git(here)].append("git can't be run")
        return None
    if not ended.stdout:
        if b"not a git repository (or any" not in ended.stderr:
            left[_no_git(here)].append(_said(ended))
        return None
    if ended.returncode:
        return Path(os.fsdecode(ended.stdout[:-1])).resolve(), ""
    top, commit, _ = ended.stdout.rsplit(b"\n", 2)
    return Path(os.fsdecode(top)).resolve(), commit.decode()


def _git(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    # without the variables that point elsewhere: a hook's GIT_DIR
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        return subprocess.run(
            ["git", *words],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"git {words[0]} took more than {GIT_TIMEOUT_S} s in {folder}: is that a repository of code? "
            "`git init` in the project's own folder makes that the repository"
        ) from None


def _fields(output: bytes) -> list[str]:
    return os.fsdecode(output).split("\0")[:-1]


def _said(ended: subprocess.CompletedProcess[bytes]) -> str:
    """git's own words, the first line of them."""
    return os.fsdecode(ended.stderr).partition("\n")[0].removeprefix("fatal: ") or f"exit code {ended.returncode}"


def _no_git(folder: Path) -> str:
    return f"what git would list in {_shown(str(folder))}, all but {' '.join(CODE)}"


def _patch(tree: _Tree, files: Mapping[str, int], max_mb: float) -> str:
    """The changes of tracked files since the commit, less the files that are left out."""
    diff = ("diff", "HEAD", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-color", "--submodule=short")
    listed = _git(tree.top, *diff, "--name-only", "-z")
    if listed.returncode:
        tree.left[PATCH].append(_said(listed))
        return ""
    changed = _fields(listed.stdout)
    out = [f":(exclude,literal){name}" for name in changed if name not in files and tree.stays_out(name)]
    if len(out) == len(changed):
        return ""
    if len(out) > MOST_PATHSPECS:
        tree.left[PATCH].append(f"{len(out):,} changed files are left out of the snapshot")
        return ""
    prefixes = ("--src-prefix=a/", "--dst-prefix=b/")  # the user's own diffs may have none, and `git apply` wants them
    ended = _git(tree.top, *diff, "--binary", *prefixes, "--", ".", *out)
    if ended.returncode:
        tree.left[PATCH].append(_said(ended))
        return ""
    if len(ended.stdout) > max_mb * MB:
        tree.left[PATCH].append(f"{_mb(len(ended.stdout))}, more than launcher.snapshot_max_mb")
        return ""
    return ended.stdout.decode(errors="surrogateescape")


# --- what it weighs


def _check_size(sizes: Mapping[str, int], max_mb: float, tree: _Tree) -> None:
    yours = {name: size for name, size in sizes.items() if not tree.is_ours(name)}
    total = sum(yours.values())
    if total > max_mb * MB:
        raise UserError(
            f"launcher.snapshot_max_mb: the code in {tree.top} takes {_mb(total)}, more than {max_mb:g} MB; the biggest: "
            f"{_biggest(yours, _mb)}; name what jobs don't import in launcher.snapshot_exclude, or raise the limit"
        )


def _biggest(sizes: Mapping[str, int], show: Callable[[int], str]) -> str:
    """The three heaviest files or folders: of a folder that is nearly all in one part, that part."""
    weights: Counter[str] = Counter()
    parts: dict[str, set[str]] = defaultdict(set)
    for name, size in sizes.items():
        for part in _prefixes(name):
            weights[part] += size
            parts[part.rpartition("/")[0]].add(part)

    def heaviest(folder: str) -> list[str]:
        return sorted(parts[folder], key=lambda part: (-weights[part], part))[:3]

    found = heaviest("")
    for index, part in enumerate(found):
        while part in parts and weights[below := heaviest(part)[0]] > 0.8 * weights[part]:
            part = below
        found[index] = f"{_shown(part)}{'/' if part in parts else ''} ({show(weights[part])})"
    return ", ".join(found)


def _mb(size: float) -> str:
    return f"{size / MB:,.1f} MB"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(map(_shown, names[:5])) + more


def _shown(name: str) -> str:
    """The name in one line that can be printed: it may hold newlines, and bytes that are no text."""
    return name if name.isprintable() else repr(name)[1:-1]


# --- the copy


def _seals(files: Mapping[str, str], left: dict[str, list[str]], draft: Path | None = None) -> dict[str, bytes]:
    """What each file adds to the id: its kind and the digest of its content; with `draft`, of what was copied to there."""
    seals = {}
    for name, source in files.items():
        try:
            file = os.readlink(source) if os.path.islink(source) else FileIO(source)
        except (FileNotFoundError, NotADirectoryError):  # an editor's temporary file, gone since it was listed
            continue
        except PermissionError:
            left[UNREADABLE].append(name.partition("/")[2])
            continue
        seals[name] = _seal(file, draft and draft / name)
    return seals


def _seal(file: FileIO | str, copy: Path | None) -> bytes:
    """The seal of an open file or of a link's target."""
    if isinstance(file, str):
        if copy:
            os.symlink(file, copy)
        return b"l" + hashlib.sha256(os.fsencode(file)).digest()
    digest = hashlib.sha256()
    with file:
        mode = os.fstat(file.fileno()).st_mode
        # nobody edits the copy by accident, and nobody reads it who can't read the original
        readable = mode & 0o555 | stat.S_IRUSR
        with (
            open(copy, "xb", opener=lambda path, flags: os.open(path, flags, readable)) if copy else nullcontext() as to
        ):
            while chunk := file.read(1 << 18):
                digest.update(chunk)
                if to:
                    to.write(chunk)
    return (b"x" if mode & stat.S_IXUSR else b"f") + digest.digest()


def _id(seals: Mapping[str, bytes]) -> str:
    records = sorted(os.fsencode(name) + b"\0" + seal for name, seal in seals.items())
    return hashlib.sha256(b"".join(records)).hexdigest()[:16]


def _publish(files: Mapping[str, str], snapshots: Path, left: dict[str, list[str]]) -> dict[str, bytes]:
    """Copies the files into a folder that appears whole and is named by what was copied, should a file change just now."""
    draft = snapshots / f".draft.{os.getpid()}.{os.urandom(4).hex()}"
    try:
        (draft / "repo").mkdir(parents=True)
        for folder in dict.fromkeys(os.path.dirname(name) for name in files):
            os.makedirs(draft / folder, exist_ok=True)
        seals = _seals(files, left, draft)
        try:
            os.rename(draft, snapshots / _id(seals))
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            shutil.rmtree(draft)  # another process was faster
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError) and not error.filename:  # a full disk is told with the place
            error.filename = str(snapshots)
        raise
    return seals
