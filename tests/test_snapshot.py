"""The code that a job imports is the code that stood there at its submission: what is copied, what isn't, and what is said."""

import ctypes
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import fairexp
from fairexp.errors import UserError
from fairexp.launch import snapshot
from fairexp.launch.snapshot import Snapshot

PACKAGE = Path(fairexp.__file__).parent


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder without the developer's own settings of git, and a shell without git's variables."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.gitconfig").write_text(
        '[user]\nname = Ada\nemail = ada@example.org\n[init]\ndefaultBranch = main\n[protocol "file"]\nallow = always\n'
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder without git."""
    folder = tmp_path / "plain"
    write(folder, {"ourpaper/__init__.py": "", "ourpaper/nets.py": "WIDTH = 1\n"})
    return folder


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with one commit."""
    folder = tmp_path / "repo"
    write(folder, {"ourpaper/__init__.py": "", "ourpaper/nets.py": "WIDTH = 1\n", ".gitignore": "*.ckpt\n/scratch/\n"})
    git(folder, "init", "-q")
    commit(folder)
    return folder


def write(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, check=True)
    return os.fsdecode(done.stdout).strip()


def commit(folder: Path) -> str:
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "-q", "--allow-empty", "-m", "x")
    return git(folder, "rev-parse", "HEAD")


def take(here: Path, max_mb: float = 10, exclude: Sequence[str] = (), runs_dir: Path | None = None) -> Snapshot:
    return snapshot.take(runs_dir or here.parent / "runs", here, max_mb, exclude)


def copied(taken: Snapshot, folder: str = "repo") -> set[str]:
    """The files and links of the snapshot."""
    top = taken.path / folder
    return {path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_symlink() or not path.is_dir()}


def python(import_paths: Sequence[str], code: str, cwd: Path) -> str:
    """What a process prints that imports from there, as a job does."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(import_paths)}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def in_process(code: str, here: Path, path: Path = PACKAGE.parent, **options: object) -> subprocess.Popen[str]:
    """A process that runs the code with `take` at hand, in the folder `here`."""
    code = f"from pathlib import Path\nfrom fairexp.launch.snapshot import take\n{code}"
    variables = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        cwd=here,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


# --- what it is for


@pytest.mark.parametrize("kind", ["repo", "plain"])
def test_a_job_imports_what_stood_there_at_the_submission(kind: str, request: pytest.FixtureRequest) -> None:
    here: Path = request.getfixturevalue(kind)
    write(here, {"ourpaper/nets.py": "WIDTH = 2\n", "ourpaper/new.py": "from ourpaper.nets import WIDTH\n"})
    taken = take(here)
    write(here, {"ourpaper/nets.py": "WIDTH = 3\n"})
    (here / "ourpaper/new.py").unlink()
    code = "import ourpaper.new as new, fairexp.launch.snapshot as ours; print(new.WIDTH, new.__file__, ours.__file__)"
    width, new, ours = python(taken.import_paths, code, cwd=here).split(" ")
    assert width == "2"
    assert new == f"{taken.path}/repo/ourpaper/new.py"
    assert ours == f"{taken.path}/lib/fairexp/launch/snapshot.py"


def test_fairexp_is_copied_whole_but_for_its_bytecode(plain: Path) -> None:
    taken = take(plain)
    package = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert copied(taken, "lib/fairexp") == {name for name in package if "__pycache__" not in name}
    assert (taken.path / "lib/fairexp/datasets/digits.csv.gz").read_bytes()
    assert taken.import_paths[-1] == str(taken.path / "lib")


def test_fairexp_in_the_repository_is_copied_with_it_and_no_exclusion_or_limit_reaches_it(repo: Path) -> None:
    shutil.copytree(PACKAGE, repo / "vendor/fairexp", ignore=shutil.ignore_patterns("__pycache__"))
    commit(repo)
    code = "print(*take(Path.cwd().parent / 'runs', Path.cwd(), 0.1, ['vendor', '*.gz', 'ourpaper']).import_paths)"
    said, wrong = in_process(code, repo, path=repo / "vendor").communicate()
    assert wrong == ""
    top, vendor = said.split()
    assert vendor == f"{top}/vendor"
    assert not (Path(top).parent / "lib").exists()
    assert not (Path(top) / "ourpaper").exists()
    assert (Path(vendor) / "fairexp/datasets/digits.csv.gz").is_file()
    found = python([top, vendor], "import fairexp; print(fairexp.__file__)", cwd=repo)
    assert found == f"{vendor}/fairexp/__init__.py"


# --- which files: git


def test_a_repositorys_snapshot_is_its_work_tree_less_what_git_ignores(repo: Path) -> None:
    write(repo, {"deep/er/gone.py": "", "deep/kept.sh": "", "big.ckpt": "tracked, though ignored"})
    commit(repo)
    (repo / "deep/er/gone.py").unlink()
    write(repo, {"ourpaper/nets.py": "WIDTH = 'edited'\n", "notes.md": "new", "x/weights.ckpt": "new, and ignored"})
    taken = take(repo / "ourpaper")
    names = {"ourpaper/__init__.py", "ourpaper/nets.py", "notes.md", "deep/kept.sh", "big.ckpt", ".gitignore"}
    assert copied(taken) == names
    assert (taken.path / "repo/ourpaper/nets.py").read_text() == "WIDTH = 'edited'\n"
    assert (taken.source, taken.left_out) == (repo, [])


def test_a_working_folder_that_git_ignores_is_copied_too(repo: Path) -> None:
    write(repo, {"scratch/mine.py": "", "scratch/out.log": "", "scratch/deep/conf.yaml": ""})
    taken = take(repo / "scratch")
    assert {"scratch/mine.py", "scratch/deep/conf.yaml", "ourpaper/nets.py"} < copied(taken)
    assert "scratch/out.log" not in copied(taken)
    assert taken.import_paths[0] == f"{taken.path}/repo/scratch"
    assert "scratch/mine.py" not in copied(take(repo))


def test_submodules_and_clones_are_copied_with_their_new_files(repo: Path, plain: Path) -> None:
    write(plain, {".gitignore": "*.ckpt\n"})
    git(plain, "init", "-q")
    commit(plain)
    git(repo, "submodule", "--quiet", "add", str(plain), "their code")
    git(repo, "clone", "-q", str(plain), "lib/clone")
    for nested in ("their code", "lib/clone"):
        write(repo / nested, {"new.py": "", "new.ckpt": "", "ourpaper/nets.py": "WIDTH = 7\n"})
    taken = take(repo)
    for nested in ("their code", "lib/clone"):
        assert {f"{nested}/ourpaper/nets.py", f"{nested}/new.py"} < copied(taken)
        assert (taken.path / "repo" / nested / "ourpaper/nets.py").read_text() == "WIDTH = 7\n"
    assert not [name for name in copied(taken) if name.endswith("new.ckpt") or "/.git/" in name]


def test_another_work_tree_of_the_repository_is_not_its_code(repo: Path) -> None:
    git(repo, "worktree", "add", "-q", "trees/other")
    assert not [name for name in copied(take(repo)) if name.startswith("trees")]
    write(repo / "trees/other", {"new.py": ""})
    assert copied(take(repo / "trees/other")) == {"ourpaper/__init__.py", "ourpaper/nets.py", ".gitignore", "new.py"}


def test_environments_and_bytecode_are_not_code_unless_they_are_tracked(repo: Path) -> None:
    write(repo, {"node_modules/kept.js": "", "vendor/site-packages/kept.py": ""})
    commit(repo)
    write(
        repo,
        {
            "env/pyvenv.cfg": "",
            "env/lib/x.py": "",
            "conda/conda-meta/history": "",
            "conda/lib/x.py": "",
            "site-packages/x.py": "",
            "js/node_modules/x.js": "",
            "ourpaper/__pycache__/nets.cpython-311.pyc": "",
        },
    )
    ours = {"ourpaper/__init__.py", "ourpaper/nets.py", ".gitignore"}
    assert copied(take(repo)) == ours | {"node_modules/kept.js", "vendor/site-packages/kept.py"}


def test_names_may_hold_spaces_newlines_and_bytes_that_are_no_text(repo: Path) -> None:
    names = ["a b.py", "a\nb.py", "naïve.py", '"quoted".py', "-n", ":(top)x", "*", os.fsdecode(b"\xff/\xfe.py")]
    write(repo, dict.fromkeys(names, "tracked"))
    commit(repo)
    write(repo, dict.fromkeys(names, "edited") | {f"new {name}": "new" for name in names})
    taken = take(repo)
    assert {*names, *(f"new {name}" for name in names)} < copied(taken)
    assert taken.patch.count("\n+edited") == len(names)


def test_git_is_asked_as_often_for_many_files_as_for_few(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: asked.append(words) or run(*words, **options))
    take(repo)
    few, asked[:] = len(asked), []
    write(repo, {f"many/{number}.py": "" for number in range(200)})
    take(repo)
    assert len(asked) == few <= 5


def test_a_folder_that_has_become_a_link_is_a_link(repo: Path) -> None:
    write(repo, {"elsewhere/nets.py": "other"})
    shutil.rmtree(repo / "ourpaper")
    (repo / "ourpaper").symlink_to("elsewhere")
    taken = take(repo)
    assert copied(taken) == {"elsewhere/nets.py", "ourpaper", ".gitignore"}
    assert (taken.path / "repo/ourpaper/nets.py").read_text() == "other"


def test_gits_variables_of_a_hook_do_not_mislead(repo: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(plain, "init", "-q")
    write(plain, {"theirs.py": ""})
    commit(plain)
    expected = take(repo)
    for name, value in {
        "GIT_DIR": plain / ".git",
        "GIT_WORK_TREE": plain,
        "GIT_INDEX_FILE": plain / ".git/index",
    }.items():
        monkeypatch.setenv(name, str(value))
    assert take(repo) == expected
    assert "theirs.py" not in copied(expected)


# --- which files: without git


def test_without_git_the_endings_of_code_are_copied(plain: Path) -> None:
    code = {"a.py", "a.pyi", "c/a.yaml", "c/a.yml", "a.json", "a.toml", "a.cfg", "a.txt", "a.csv", "a.csv.gz"}
    other = {
        "model.pt",
        "a.md",
        ".hidden/a.py",
        "node_modules/a.json",
        "v/pyvenv.cfg",
        "v/lib/a.py",
        "site-packages/a.py",
    }
    write(plain, dict.fromkeys([*code, *other, "ourpaper/__pycache__/a.py"], ""))
    taken = take(plain)
    assert copied(taken) == code | {"ourpaper/__init__.py", "ourpaper/nets.py"}
    assert (taken.source, taken.commit, taken.patch, taken.left_out) == (plain, "", "", [])


def test_a_project_folder_that_is_an_environment_itself_is_copied(plain: Path) -> None:
    write(plain, {"pyvenv.cfg": "", "lib/python3.11/site-packages/x.py": ""})
    assert copied(take(plain)) == {"ourpaper/__init__.py", "ourpaper/nets.py", "pyvenv.cfg"}


def git_of_another_user(tmp_path: Path, repo: Path) -> str:
    real = shutil.which("git")
    write(tmp_path / "bin", {"git": f'#!/bin/sh\nGIT_TEST_ASSUME_DIFFERENT_OWNER=1 exec {real} "$@"\n'})
    (tmp_path / "bin/git").chmod(0o755)
    return f"detected dubious ownership in repository at '{repo}'"


def git_is_missing(tmp_path: Path, repo: Path) -> str:
    (tmp_path / "bin").mkdir()
    return "git can't be run"


def git_is_broken(tmp_path: Path, repo: Path) -> str:
    shutil.rmtree(repo / ".git")
    write(repo, {".git": "gitdir: /nowhere/.git/worktrees/repo\n"})
    return "not a git repository: /nowhere/.git/worktrees/repo"


@pytest.mark.parametrize("trouble", [git_of_another_user, git_is_missing, git_is_broken])
def test_where_git_fails_the_endings_decide_and_a_line_says_so(
    trouble: Callable[[Path, Path], str], repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(repo, {"tool.sh": ""})
    said = trouble(tmp_path, repo)
    monkeypatch.setenv(
        "PATH", f"{tmp_path}/bin" if trouble is git_is_missing else f"{tmp_path}/bin:{os.environ['PATH']}"
    )
    taken = take(repo)
    assert copied(taken) == {"ourpaper/__init__.py", "ourpaper/nets.py"}
    (line,) = taken.left_out
    assert line.startswith(f"what git would list in {repo}, all but *.py ")
    assert line.endswith(f": {said}")
    assert (taken.commit, taken.patch) == ("", "")


def test_a_plain_folder_needs_no_git_and_no_word_about_it(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert take(plain).left_out == []


def test_a_folder_with_far_too_many_files_is_not_walked_to_the_end(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "MOST_FILES", 50)
    write(plain, {f"data/{number}.bin": "" for number in range(60)})
    with pytest.raises(
        UserError, match=rf"^launcher.snapshot_exclude: {plain} holds more than 50 files: work in .*exclude"
    ):
        take(plain)
    assert copied(take(plain, exclude=["data"])) == {"ourpaper/__init__.py", "ourpaper/nets.py"}


def test_a_repository_with_far_too_many_files_names_the_folder(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MOST_FILES", 50)
    write(repo, {f"data/raw/{number}.bin": "" for number in range(60)})
    with pytest.raises(
        UserError, match=r"holds 63 files that git doesn't ignore, more than 50; the most: data/raw/ \(60\), "
    ):
        take(repo)
    write(repo, {".gitignore": "data"})
    assert len(copied(take(repo))) == 3


def test_git_that_takes_for_ever_is_the_users_to_mend(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "GIT_TIMEOUT_S", 0)
    with pytest.raises(UserError, match=r"^git rev-parse took more than 0 s in .*repo"):
        take(repo)


# --- what stays out


@pytest.mark.parametrize("kind", ["repo", "plain"])
def test_the_folder_of_runs_is_never_copied(kind: str, request: pytest.FixtureRequest) -> None:
    here: Path = request.getfixturevalue(kind)
    before = take(here)
    write(here, {"out/a-1/config.yaml": "", "out/loose.py": ""})
    commit(here) if kind == "repo" else None
    taken = take(here, runs_dir=here / "out")
    assert taken.id == before.id
    assert take(here, runs_dir=here / "out").id == before.id  # though it holds a snapshot now
    (here.parent / "link").symlink_to(here / "out")
    assert take(here, runs_dir=here.parent / "link").id == before.id


def test_without_git_another_folder_of_runs_is_not_code_unless_one_works_in_it(plain: Path) -> None:
    before = take(plain)
    write(plain, {"old/.lock": "", "old/submissions/u/a.json": "", "old/a-1/config.yaml": ""})
    assert take(plain).id == before.id
    write(plain, {".lock": "", "submissions/u/a.json": ""})
    assert take(plain, runs_dir=plain).id == before.id


@pytest.mark.parametrize("kind", ["repo", "plain"])
def test_code_in_the_folder_of_runs_is_copied_and_the_runs_are_not(kind: str, request: pytest.FixtureRequest) -> None:
    here: Path = request.getfixturevalue(kind)
    before = take(here)
    write(here, {"a-1/status.json": "", "a-1/config.yaml": "", "sweeps/s/sweep.json": "", "submissions/u/a.json": ""})
    assert take(here, runs_dir=here).id == before.id
    assert take(here, runs_dir=here).id == before.id
    assert take(here / "ourpaper", runs_dir=here).path.parent == here / "snapshots"


@pytest.mark.parametrize(
    ("exclude", "out"),
    [
        (["data"], {"data/a.json", "data/deep/b.json"}),
        (["data/"], {"data/a.json", "data/deep/b.json"}),
        (["data/*"], {"data/a.json", "data/deep/b.json"}),
        (["./data/deep"], {"data/deep/b.json"}),
        (["d?ta"], {"data/a.json", "data/deep/b.json"}),
        (["*.json"], {"a.json", "data/a.json", "data/deep/b.json"}),
        (["**/a.json"], {"a.json", "data/a.json"}),
        (["deep", "b.json", "DATA", ""], set()),
        (["a.json", "data/deep/*"], {"a.json", "data/deep/b.json"}),
    ],
)
@pytest.mark.parametrize("kind", ["repo", "plain"])
def test_what_the_globs_match_or_lies_in_a_folder_that_they_match_is_left_out_without_a_word(
    kind: str, exclude: list[str], out: set[str], request: pytest.FixtureRequest
) -> None:
    here: Path = request.getfixturevalue(kind)
    write(here, dict.fromkeys(["a.json", "data/a.json", "data/deep/b.json"], ""))
    taken = take(here, exclude=exclude)
    assert copied(take(here)) - copied(taken) == out
    assert taken.left_out == []


SECRETS = """
.env .env.local prod.env .envrc .netrc _netrc a.pem keys/b.key c.p12 c.pfx id_rsa id_rsa.pub id_ed25519 id_ecdsa-sk .pgpass
credentials credentials.json sub/Credentials.YAML d.kdbx .git-credentials .aws/config .aws/x.py .ssh/known_hosts secrets.yaml
secrets.toml secrets/token.txt sub/.ENV wandb/settings .pypirc kaggle.json .docker/config.json
"""
SOURCES = """
credentials.py secrets.py secrets/__init__.py id_rsa_attack.py env.yaml environment.env.md monkey.txt keys.txt
tokens/tokenizer.json wandb/metadata.json settings .docker/Dockerfile
"""


def test_what_may_hold_secrets_is_never_copied_also_when_it_is_tracked(repo: Path) -> None:
    ours, secrets = copied(take(repo)), SECRETS.split()
    write(repo, dict.fromkeys(secrets, "hunter2"))
    taken = [take(repo)]
    commit(repo)
    taken.append(take(repo))
    write(repo, dict.fromkeys(secrets, "hunter3"))
    taken.append(take(repo))
    for one in taken:
        assert copied(one) == ours
        (line,) = one.left_out
        assert re.fullmatch(rf"files that may hold secrets: (\S+, ){{4}}\S+ and {len(secrets) - 5} more", line)
    for name in secrets:
        (repo / name).unlink()
    taken.append(take(repo))
    assert {one.id for one in taken} == {taken[0].id}
    assert {one.patch for one in taken} == {""}


def test_source_files_named_like_secrets_are_code(repo: Path) -> None:
    write(repo, dict.fromkeys(SOURCES.split(), ""))
    taken = take(repo)
    assert set(SOURCES.split()) < copied(taken)
    assert taken.left_out == []


def test_names_stand_in_one_line_a_reason_five_of_them(repo: Path) -> None:
    write(repo, {f"{number}.pem": "" for number in range(9)} | {"a\nb.key": ""} | {"w.bin": bytes(1_100_000)})
    secret, large = take(repo).left_out
    assert secret == "files that may hold secrets: 0.pem, 1.pem, 2.pem, 3.pem, 4.pem and 5 more"
    assert large == "files over 1.0 MB, a tenth of launcher.snapshot_max_mb: w.bin (1.1 MB)"
    (line,) = take(repo, exclude=["*.pem", "*.bin"]).left_out
    assert line == r"files that may hold secrets: a\nb.key"


def test_a_large_file_is_left_out_with_its_size(repo: Path) -> None:
    write(repo, {"limit.bin": bytes(100_000), "ourpaper/over.bin": bytes(123_456)})
    commit(repo)
    taken = take(repo, max_mb=1)
    assert "limit.bin" in copied(taken)
    assert "ourpaper/over.bin" not in copied(taken)
    assert taken.left_out == ["files over 0.1 MB, a tenth of launcher.snapshot_max_mb: ourpaper/over.bin (0.1 MB)"]


def test_too_much_is_the_users_mistake_with_what_weighs_most(repo: Path, tmp_path: Path) -> None:
    write(repo, {f"data/raw/{number}.bin": bytes(90_000) for number in range(9)})
    write(repo, {"a.bin": bytes(80_000), "figures/1.pdf": bytes(50_000), "figures/2.pdf": bytes(60_000), "b.bin": b"x"})
    with pytest.raises(UserError) as caught:
        take(repo, max_mb=1)
    (line,) = caught.value.problems
    assert line == (
        f"launcher.snapshot_max_mb: the code in {repo} takes 1.0 MB, more than 1 MB; the biggest: data/raw/ (0.8 MB), "
        "figures/ (0.1 MB), a.bin (0.1 MB); name what jobs don't import in launcher.snapshot_exclude, or raise the limit"
    )
    assert not (tmp_path / "runs").exists()
    assert "a.bin" in copied(take(repo, max_mb=1, exclude=["data/raw"]))
    assert len(copied(take(repo, max_mb=1.1))) == 16


@pytest.mark.parametrize("kind", ["repo", "plain"])
def test_links_that_stay_inside_are_links_and_others_are_left_out(kind: str, request: pytest.FixtureRequest) -> None:
    here: Path = request.getfixturevalue(kind)
    write(here.parent, {"outside/x.py": ""})
    links = {
        "nets.py": "ourpaper/nets.py",
        "paper": "ourpaper",
        "ourpaper/up.py": "../nets.py",
        "dangling.py": "not_there.py",
        "out.py": "../outside/x.py",
        "folder": "../outside",
        "through.py": "folder/x.py",
        "absolute.py": f"{here}/ourpaper/nets.py",
        "loop.py": "loop.py",
        "round.py": f"../{here.name}/nets.py",
    }
    for name, target in links.items():
        (here / name).symlink_to(target)
    taken = take(here)
    stay = {"nets.py", "paper", "ourpaper/up.py", "dangling.py", "loop.py"}
    assert {name for name in copied(taken) if (taken.path / "repo" / name).is_symlink()} == stay
    assert {os.readlink(taken.path / "repo" / name) for name in stay} == {links[name] for name in stay}
    assert (taken.path / "repo/paper/up.py").resolve() == taken.path / "repo/ourpaper/nets.py"
    (line,) = taken.left_out
    assert line.startswith("links that are absolute or lead out of the folder: absolute.py -> ")
    assert "folder -> ../outside, " in line
    assert line.count(" -> ") == 5


@pytest.mark.parametrize("kind", ["repo", "plain"])
def test_pipes_and_sockets_are_left_out_silently(kind: str, request: pytest.FixtureRequest) -> None:
    here: Path = request.getfixturevalue(kind)
    before = take(here)
    os.mkfifo(here / "pipe.py")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(here / "socket.py"))
        taken = take(here)
        assert (taken.id, taken.left_out) == (before.id, [])


def test_a_module_that_an_import_will_miss_is_said(repo: Path) -> None:
    write(
        repo,
        {".gitignore": "_version.py\n*.so\n*.log", "ourpaper/_version.py": "", "ourpaper/fast.so": "", "x.log": ""},
    )
    taken = take(repo)
    reason = "modules beside the copied ones that are compiled, or ignored by git"
    assert [line.partition(": ")[0] for line in taken.left_out] == [reason]
    assert set(taken.left_out[0].partition(": ")[2].split(", ")) == {"ourpaper/_version.py", "ourpaper/fast.so"}
    assert take(repo, exclude=["*/_version.py", "*.so"]).left_out == []


@pytest.mark.parametrize("kind", ["repo", "plain"])
def test_what_cannot_be_read_is_said_and_not_copied(kind: str, request: pytest.FixtureRequest) -> None:
    here: Path = request.getfixturevalue(kind)
    write(here, {"closed.py": "", "folder/x.py": ""})
    (here / "closed.py").chmod(0)
    (here / "folder").chmod(0)

    def mortal() -> None:
        for capability in (1, 2):  # root too may not read it: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP

    process = in_process("print(*take(Path('../runs'), Path.cwd(), 1, []).left_out)", here, preexec_fn=mortal)
    said, wrong = process.communicate()
    (here / "folder").chmod(0o755)
    assert wrong == ""
    folder = "folder/, " if kind == "plain" else ""  # git doesn't list it
    assert said.strip() == f"what can't be read: {folder}closed.py"


# --- the commit and the patch


def test_the_commit_and_the_patch_make_the_work_tree_again(repo: Path, tmp_path: Path) -> None:
    write(
        repo, {"crlf.txt": "a\r\nb\r\n", "latin.txt": b"caf\xe9\n", "weights.bin": bytes(range(256)), "gone.txt": "x\n"}
    )
    head = commit(repo)
    changed: dict[str, str | bytes] = {
        "crlf.txt": "a\r\nc\r\n",
        "latin.txt": b"\xe9t\xe9\n",
        "weights.bin": bytes(range(255)),
        "ourpaper/nets.py": "x",
    }
    write(repo, changed)
    (repo / "gone.txt").unlink()
    git(repo, "config", "diff.noprefix", "true")
    git(repo, "config", "color.ui", "always")
    git(repo, "config", "diff.external", "/bin/true")
    taken = take(repo)
    assert taken.commit == head
    git(tmp_path, "clone", "-q", str(repo), "again")
    (tmp_path / "patch").write_text(taken.patch, errors="surrogateescape")
    git(tmp_path / "again", "apply", str(tmp_path / "patch"))
    for name, content in changed.items():
        assert (tmp_path / "again" / name).read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert not (tmp_path / "again/gone.txt").exists()
    assert take(tmp_path / "again").id == taken.id


def test_before_the_first_commit_there_is_neither(plain: Path) -> None:
    git(plain, "init", "-q")
    git(plain, "add", "ourpaper/nets.py")
    write(plain, {"tool.sh": ""})
    taken = take(plain)
    assert (taken.commit, taken.patch, taken.left_out) == ("", "", [])
    assert copied(taken) == {"ourpaper/__init__.py", "ourpaper/nets.py", "tool.sh"}


def test_the_patch_holds_nothing_of_the_files_that_are_left_out(repo: Path) -> None:
    names = [".env", "sub dir/*.pem", "data/x.json", "big.bin", "runs/a.json", "conf"]
    write(repo, dict.fromkeys(names, "old secret\n"))
    commit(repo)
    write(repo, dict.fromkeys(names, "new secret\n") | {"big.bin": b"new secret\n" + bytes(100_001)})
    (repo / "conf").unlink()
    write(repo, {"conf/.env": "new secret\n", "conf/fine.py": "fine = 1\n", "ourpaper/nets.py": "WIDTH = 'fine'\n"})
    git(repo, "add", "conf")
    taken = take(repo, max_mb=1, exclude=["data"], runs_dir=repo / "runs")
    assert "+WIDTH = 'fine'" in taken.patch
    assert "+fine = 1" in taken.patch
    assert "new secret" not in taken.patch
    assert set(re.findall("^diff --git a/(.*) b/", taken.patch, re.MULTILINE)) == {
        "conf",
        "conf/fine.py",
        "ourpaper/nets.py",
    }


def test_a_secret_file_that_has_got_another_name_leaves_no_old_line_in_the_patch(repo: Path) -> None:
    lines = "".join(f"line {number}\n" for number in range(20))
    write(repo, {".env": lines + "old secret\n"})
    commit(repo)
    git(repo, "mv", ".env", "notes.txt")
    write(repo, {"notes.txt": lines})
    patch = take(repo).patch
    assert "+line 19" in patch
    assert "secret" not in patch


def test_a_patch_over_the_limit_is_left_out_with_a_line(repo: Path) -> None:
    write(repo, {"big.bin": os.urandom(1_000_000)})
    commit(repo)
    (repo / "big.bin").unlink()
    taken = take(repo, max_mb=0.5)
    assert taken.patch == ""
    (line,) = taken.left_out
    assert re.fullmatch(r"the patch of uncommitted changes: 1\.\d MB, more than launcher\.snapshot_max_mb", line)


# --- the copy


def test_the_same_content_is_the_same_snapshot_and_nothing_is_written(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(repo, {"new.py": "1"})
    taken = take(repo)
    assert re.fullmatch("[0-9a-f]{16}", taken.id)
    assert taken.path == tmp_path / "runs/snapshots" / taken.id
    times = {path: path.lstat().st_ctime_ns for path in (tmp_path / "runs").rglob("*")}
    os.utime(repo / "new.py", (1, 1))
    (repo / "new.py").chmod(0o640)
    monkeypatch.delattr(snapshot, "_publish")
    assert take(repo) == taken
    assert {path: path.lstat().st_ctime_ns for path in (tmp_path / "runs").rglob("*")} == times
    commit(repo)
    assert take(repo).id == taken.id
    shutil.copytree(repo, tmp_path / "elsewhere/repo", symlinks=True)
    assert take(tmp_path / "elsewhere/repo", runs_dir=tmp_path / "runs").id == taken.id


def test_contents_names_executable_bits_and_targets_of_links_make_the_id(repo: Path) -> None:
    (repo / "link.py").symlink_to("ourpaper/nets.py")
    ids = [take(repo).id]

    def changes() -> None:
        ids.append(take(repo).id)

    (repo / "ourpaper/nets.py").write_text("WIDTH = 2\n")
    changes()
    (repo / "ourpaper/nets.py").rename(repo / "ourpaper/net.py")
    changes()
    (repo / "ourpaper/net.py").chmod(0o755)
    changes()
    (repo / "link.py").unlink()
    (repo / "link.py").symlink_to("ourpaper/net.py")
    changes()
    (repo / "link.py").unlink()
    (repo / "link.py").write_text("ourpaper/net.py")
    changes()
    assert len(set(ids)) == len(ids) == 6


def test_the_copies_are_read_only_and_no_more_readable_than_the_originals(repo: Path) -> None:
    modes = {"a.py": (0o644, 0o444), "b.sh": (0o755, 0o555), "c.py": (0o664, 0o444), "d.py": (0o600, 0o400)}
    write(repo, dict.fromkeys(modes, ""))
    for name, (mode, _) in modes.items():
        (repo / name).chmod(mode)
    taken = take(repo)
    for name, (_, mode) in modes.items():
        assert stat.S_IMODE((taken.path / "repo" / name).stat().st_mode) == mode, name
    assert not [path for path in taken.path.rglob("*") if path.is_file() and path.stat().st_mode & 0o222]
    shutil.rmtree(taken.path)  # but a person can throw it away


def test_processes_that_take_it_at_once_share_one(repo: Path, tmp_path: Path) -> None:
    write(repo, {f"many/{number}.py": str(number) for number in range(100)})
    code = "print('ready', flush=True); input(); print(take(Path('../runs'), Path.cwd(), 10, []).id)"
    processes = [in_process(code, repo) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [process.communicate() for process in processes]
    assert {wrong for _, wrong in ends} == {""}
    assert {said.strip() for said, _ in ends} == {take(repo).id}
    assert os.listdir(tmp_path / "runs/snapshots") == [take(repo).id]


def test_the_slower_process_drops_its_copy(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(draft: Path, final: Path) -> None:
        (final / "first").mkdir(parents=True)
        rename(draft, final)

    rename = os.rename
    monkeypatch.setattr(os, "rename", lose)
    taken = take(repo)
    assert os.listdir(tmp_path / "runs/snapshots") == [taken.id]
    assert os.listdir(taken.path) == ["first"]


def test_a_file_that_is_edited_during_the_copy_gives_the_id_of_what_was_copied(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit_first(*words: Any) -> dict[str, bytes]:
        write(repo, {"ourpaper/nets.py": "WIDTH = 'edited'\n"})
        (repo / "temporary.py").unlink()
        return publish(*words)

    publish = snapshot._publish
    write(repo, {"temporary.py": ""})
    monkeypatch.setattr(snapshot, "_publish", edit_first)
    taken = take(repo)
    monkeypatch.undo()
    assert (taken.path / "repo/ourpaper/nets.py").read_text() == "WIDTH = 'edited'\n"
    assert "temporary.py" not in copied(taken)
    assert take(repo).id == taken.id


def test_a_full_disk_leaves_nothing_half_made(repo: Path, tmp_path: Path) -> None:
    code = """
import os, resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    take(Path("../runs"), Path.cwd(), 1, [])
except OSError as error:
    print(os.strerror(error.errno), error.filename)
"""
    said, wrong = in_process(code, repo).communicate()
    assert wrong == ""
    assert said.strip() == f"File too large {repo}/../runs/snapshots"
    assert os.listdir(tmp_path / "runs/snapshots") == []


def test_a_folder_of_runs_that_cannot_be_made_is_told_with_its_name(repo: Path, tmp_path: Path) -> None:
    write(tmp_path, {"runs": "a file"})
    with pytest.raises(NotADirectoryError, match=re.escape(f"{tmp_path}/runs")):
        take(repo)


def test_an_empty_folder_has_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    taken = take(tmp_path / "nothing")
    assert taken.import_paths == [f"{taken.path}/repo", f"{taken.path}/lib"]
    assert (taken.path / "repo").is_dir()


# --- where jobs import from


def test_the_import_paths_are_those_of_the_process_inside_the_repository(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        repo, {"src/one.py": "", "exp/run.py": "", "site-packages/x.py": "", "scratch/hidden.py": "", "libs.zip": "PK"}
    )
    git(repo, "add", "-f", "site-packages/x.py")
    (tmp_path / "link").symlink_to(repo / "src")
    ignored, outside = repo / "scratch", tmp_path / "home"
    path = [
        "",
        repo,
        tmp_path / "link",
        repo / "src",
        ignored,
        outside,
        repo / "site-packages",
        "../libs.zip",
        "/usr/lib",
    ]
    monkeypatch.setattr(sys, "path", [str(entry) for entry in path])
    taken = take(repo / "exp")
    top = f"{taken.path}/repo"
    assert taken.import_paths == [f"{top}/exp", top, f"{top}/src", f"{top}/libs.zip", f"{taken.path}/lib"]
    (tmp_path / "exp").symlink_to(repo / "exp")
    assert take(tmp_path / "exp", runs_dir=repo / "runs").import_paths == taken.import_paths


def test_editable_installs_by_a_finder_are_imported_from_the_snapshot(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(repo, {"src/theirs/__init__.py": "", "lib/single.py": "", "ns/a/b/__init__.py": "", "odd/__init__.py": ""})
    finder = types.ModuleType("__editable___theirs_0_1_finder")
    mapping = {
        "theirs": repo / "src/theirs",
        "single": repo / "lib/single",
        "a.b": repo / "ns/a/b",
        "renamed": repo / "odd",
        "fairexp.configs": repo / "odd",
        "gone": repo / "gone",
        "elsewhere": tmp_path / "elsewhere",
    }
    finder.MAPPING = {name: str(folder) for name, folder in mapping.items()}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, finder.__name__, finder)
    monkeypatch.setattr(sys, "path", [])
    taken = take(repo)
    top = f"{taken.path}/repo"
    assert taken.import_paths == [top, f"{top}/src", f"{top}/lib", f"{top}/ns", f"{taken.path}/lib"]
    (line,) = taken.left_out
    assert re.fullmatch(r"packages .* another name, which jobs import as it is when they start: renamed \(odd\)", line)
    assert (
        python(taken.import_paths, "import theirs, single; print(theirs.__file__)", repo)
        == f"{top}/src/theirs/__init__.py"
    )


def test_an_editable_install_of_setuptools_is_seen(repo: Path, tmp_path: Path) -> None:
    write(repo, {"src/theirs/__init__.py": "", "exp/x.py": ""})
    site = {"__editable___theirs_finder.py": f"MAPPING = {{'theirs': '{repo}/src/theirs'}}\n"}
    write(tmp_path / "site", site)
    code = f"import sys; sys.path.append('{tmp_path}/site'); import __editable___theirs_finder\n"
    said, wrong = in_process(
        code + "print(*take(Path('../../runs'), Path.cwd(), 1, []).import_paths)", repo / "exp"
    ).communicate()
    assert wrong == ""
    assert [Path(path).name for path in said.split()] == ["exp", "src", "lib"]
