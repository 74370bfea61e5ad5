"""Parquet files behind a URL, from a real server: the samples are those on the disk, few bytes are fetched, trouble passes."""

import base64
import fcntl
import json
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO, Fairexp, Trained
from conftest import interrupted as left_off
from range_server import Hub, RangeServer
from test_order import BATCHES, global_batches, interrupted, parquet_images, parquet_rows, picture

from fairexp.config.compose import compose
from fairexp.config.validate import problems
from fairexp.datasets import node_cache, remote
from fairexp.datasets.parquet import ParquetImages, ParquetRows

torch.set_num_threads(1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    with RangeServer(tmp_path) as running:
        yield running


@pytest.fixture(autouse=True)
def node(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's disk."""
    folder = tmp_path_factory.mktemp("node")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder / f"fairexp-{os.getuid()}-row-groups"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.02, 0.03))


def table(root: Path, count: int = 400, group: int = 50) -> pa.Table:
    """Two files of `count` rows: a wide column stands between two narrow ones, and two narrow ones are neighbours."""
    random = np.random.default_rng(0)
    noise = [random.bytes(2000) for _ in range(count)]
    whole = pa.table({"id": np.arange(count), "noise": noise, "x": random.random(count), "y": random.random(count)})
    (root / "train").mkdir(exist_ok=True)
    for name, part in (("a", whole.slice(0, count // 2)), ("b", whole.slice(count // 2))):
        pq.write_table(part, root / f"train/{name}.parquet", row_group_size=group)
    return whole


def rows(root: str | Path, files: str = "train/*.parquet", columns: Any = ("id", "x", "y"), **more: Any) -> ParquetRows:
    return ParquetRows(root, files, list(columns), **{"node_cache_gb": 0} | more)


# --- the samples ---


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", ["images", "rows"])
def test_the_order_is_that_of_the_local_files_on_any_ranks_and_processes(
    server: RangeServer, tmp_path: Path, kind: str
) -> None:
    if kind == "images":
        local = parquet_images(tmp_path)
        far: Any = ParquetImages(server.url, "a.parquet", ["image", "label"], 4, len(local), augment=True, window=3)
    else:
        local = parquet_rows(tmp_path)
        far = ParquetRows(server.url, "a.parquet", {"a": "id", "b": "tokens"}, window=2)
    ways = [(1, 0), (2, 2), (2, 0), (1, 2)]
    assert interrupted(far, BATCHES // 2, ways) == global_batches(local, 1, 0, 0, BATCHES // 2)
    assert far.fingerprint == local.fingerprint


@pytest.mark.parametrize("pattern", ["train/*.parquet", "*/b.parquet", "**/*.parquet", "train/[ab].parquet"])
def test_files_are_found_as_on_the_disk(server: RangeServer, tmp_path: Path, pattern: str) -> None:
    table(tmp_path)
    (tmp_path / "train/c.txt").write_text("no")
    (tmp_path / "train-b").mkdir()  # by name after train, and train-b/ before train/
    shutil.copy(tmp_path / "train/b.parquet", tmp_path / "train-b")
    far, near = rows(f"{server.url}/", pattern), rows(tmp_path, pattern)
    assert far.table.names == near.table.names
    assert far.fingerprint == near.fingerprint
    assert far.table.name(0) == f"{server.url}/{far.table.names[0]}: row 0"


def test_what_is_fetched_is_the_footers_and_then_the_columns_of_the_row_groups(
    server: RangeServer, tmp_path: Path
) -> None:
    whole = table(tmp_path)
    far = rows(server.url, window=2)
    assert [each.num_bytes for each in server.sent()] == [64 << 10] * 2  # what pyarrow takes for a footer
    assert len(server.asked) == 2 + 2 * 2  # the folder, without and with a slash; a size and a footer for each file
    server.asked.clear()
    order = far.permutation(torch.Generator().manual_seed(0))
    for part in order.split(10):
        ids, x, _ = far.__getitems__(part)
        assert torch.equal(ids, part)
        assert torch.equal(x, torch.from_numpy(whole["x"].to_numpy()[part.numpy()]).float())
    assert (
        len(server.asked) == 8 * 2
    )  # once each: a request for id, and one for x and y, as the noise stands between them
    footer = pq.ParquetFile(tmp_path / "train/a.parquet").metadata
    chunks = [footer.row_group(0).column(column).total_compressed_size for column in (0, 2, 3)]
    assert sum(each.num_bytes for each in server.asked) == pytest.approx(8 * sum(chunks), rel=0.05)
    assert 8 * sum(chunks) < 0.02 * far.fingerprint["bytes"]


def test_a_copy_goes_to_another_process(server: RangeServer, tmp_path: Path) -> None:
    table(tmp_path)
    far = rows(server.url)
    assert torch.equal(pickle.loads(pickle.dumps(far)).__getitems__([7])[0], torch.tensor([7]))


def test_forked_processes_have_clients_of_their_own(server: RangeServer, tmp_path: Path) -> None:
    table(tmp_path)
    far, context = rows(server.url), multiprocessing.get_context("fork")
    far.__getitems__([0])
    client = far.table.remote._client()[0]  # type: ignore[union-attr]

    def read() -> None:
        got = [far.__getitems__([row])[0].item() for row in range(0, 400, 50)]
        clients = far.table.remote._clients  # type: ignore[union-attr]
        os._exit(0 if got == list(range(0, 400, 50)) and clients[-1][1] is not client is clients[0][1] else 1)

    processes = [context.Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    assert far.__getitems__([399])[0].item() == 399  # the parent's still works beside theirs
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert far.__getitems__([199])[0].item() == 199


def read_by_processes(data: ParquetRows, num: int) -> list[int]:
    """The exit codes of forked processes that have all read the whole set: 0, if each got it."""

    def read() -> None:
        got = data.__getitems__(list(range(len(data))))[0]
        os._exit(0 if torch.equal(got, torch.arange(len(data))) else 1)

    processes = [multiprocessing.get_context("fork").Process(target=read) for _ in range(num)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def test_a_nodes_processes_fetch_each_row_group_once(server: RangeServer, tmp_path: Path, node: Path) -> None:
    table(tmp_path)
    far = rows(server.url, cache_mb=1, node_cache_gb=1)
    server.asked.clear()
    assert read_by_processes(far, 4) == [0] * 4
    assert len(server.sent()) == 8 * 2
    assert len(list(node.glob("*.arrow"))) == 8
    assert read_by_processes(rows(server.url, node_cache_gb=1), 1) == [0]
    assert len(server.sent()) == 8 * 2 + 2, "another run's footers, and nothing else"
    alone = rows(server.url)
    server.asked.clear()
    assert read_by_processes(alone, 4) == [0] * 4
    assert len(server.sent()) == 4 * 8 * 2


def test_what_the_node_holds_stays_within_its_bounds_and_the_oldest_goes(
    server: RangeServer, tmp_path: Path, node: Path
) -> None:
    table(tmp_path)
    size = rows(server.url, node_cache_gb=1).__getitems__([0]) and next(node.glob("*.arrow")).stat().st_size
    (first,) = node.glob("*.arrow")
    far = rows(server.url, node_cache_gb=3.5 * size / 2**30)
    for row in (50, 100, 150):
        os.utime(first, (row, row))  # last read long ago
        far.__getitems__([row])
    assert sum(path.stat().st_size for path in node.glob("*.arrow")) <= 3.5 * size
    assert not first.exists()
    assert len(list(node.glob("*.arrow"))) == 3
    rows(server.url, node_cache_gb=0.5 * size / 2**30).__getitems__([200])
    assert not list(node.glob("*.arrow")), "a table that doesn't fit isn't stored"


def test_a_node_without_a_good_place_is_read_without_one(server: RangeServer, tmp_path: Path, node: Path) -> None:
    table(tmp_path)

    def fetched(data: ParquetRows) -> int:
        server.asked.clear()
        assert data.__getitems__([7, 150])[0].tolist() == [7, 150]
        return len(server.sent())

    def made() -> ParquetRows:
        return rows(server.url, node_cache_gb=1)

    node.write_text("a file")
    assert fetched(made()) == 4
    node.unlink()
    node.mkdir()
    node.chmod(0o777)  # anybody could have put tables there
    assert fetched(made()) == 4
    node.chmod(0o700)
    assert fetched(made()) == 4
    assert fetched(made()) == 0
    for file in node.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    assert fetched(made()) == 4
    assert fetched(made()) == 0
    table(tmp_path)  # written anew, alike
    assert fetched(made()) == 0
    pq.write_table(pq.read_table(tmp_path / "train/b.parquet"), tmp_path / "train/a.parquet", row_group_size=50)
    server.asked.clear()
    assert made().__getitems__([7])[0].tolist() == [207], "a file that has taken another's place"


def test_a_stopped_process_that_holds_a_row_group_up_holds_it_up_for_a_while(
    server: RangeServer, tmp_path: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path)
    rows(server.url, node_cache_gb=1).__getitems__([7])
    (stored,) = node.glob("*.arrow")
    stored.unlink()
    monkeypatch.setattr(node_cache, "PATIENCE_S", 0.3)
    with open(node / f"{stored.name[:2]}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        assert rows(server.url, node_cache_gb=1).__getitems__([7])[0].item() == 7
        assert time.monotonic() - began > 0.3, "it didn't wait at all"


def test_without_a_temporary_folder_everything_is_read(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    table(tmp_path)
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    for root in (tmp_path, server.url):
        assert rows(root, node_cache_gb=1).__getitems__([7])[0].item() == 7


@pytest.mark.parametrize("given", [-1, "2", float("nan")])
def test_a_node_cache_of_no_size_is_refused(tmp_path: Path, given: Any) -> None:
    table(tmp_path)
    with pytest.raises(ValueError, match=r"^node_cache_gb=.*: takes a number of GiB, 0 for none$"):
        rows(tmp_path, node_cache_gb=given)


def test_the_hub_is_asked_for_a_list_and_for_ranges(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    table(tmp_path / "mnist")
    code = """
import sys, torch
from fairexp.datasets.parquet import ParquetRows
data = ParquetRows("hf://datasets/some/set@refs/convert/parquet/mnist", "train/*.parquet", ["id", "x"])
print(data.fingerprint == ParquetRows("mnist", "train/*.parquet", ["id", "x"]).fingerprint)
print(data.__getitems__(torch.tensor([399, 0]))[0].tolist())
"""
    with RangeServer(tmp_path, handler=Hub) as server:
        said = run_python(code, tmp_path, {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")})
    assert said == "True\n[399, 0]\n"
    api = [each.path for each in server.asked if each.path.startswith("/api")]
    assert len(api) == 2, api  # the revision, and the list of the folder
    assert len(server.sent()) == 2 + 2 * 2


def run_python(code: str, cwd: Path, env: dict[str, str]) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_nothing_of_the_network_is_loaded_for_a_folder(tmp_path: Path) -> None:
    table(tmp_path)
    code = """
import sys, fairexp.datasets.parquet as parquet
before = set(sys.modules)
parquet.ParquetRows(".", "train/*.parquet", ["id"]).__getitems__([0])
print(sorted({"aiohttp", "huggingface_hub", "fsspec.core"} & (set(sys.modules) - before)))
"""
    assert run_python(code, tmp_path, {}) == "[]\n"


# --- trouble ---


@pytest.mark.parametrize("trouble", ["503", "drop"])
def test_trouble_that_passes_is_survived(server: RangeServer, tmp_path: Path, trouble: str) -> None:
    table(tmp_path)
    server.fails = [trouble] * 3
    far = rows(server.url)
    assert len(far) == 400
    server.fails = ["no", "no", *[trouble] * 4]  # the list arrives, but no size
    assert rows(server.url).fingerprint == far.fingerprint
    server.fails = [trouble] * 3
    assert torch.equal(far.__getitems__([7, 350])[0], torch.tensor([7, 350]))
    assert server.fails == []


def test_trouble_that_stays_is_one_line_and_is_waited_for_once(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path)
    far, waits = rows(server.url), []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    server.down = True
    line = rf"^{server.url}/train/a\.parquet: can't read row group 1: ClientResponseError: 503[^\n]*$"
    for _ in range(3):
        with pytest.raises(ValueError, match=line):
            far.__getitems__([50])
    assert waits == [0.01, 0.02, 0.03]
    with pytest.raises(ValueError, match="can't list its files: ClientResponseError: 503"):
        rows(server.url)
    server.down = False
    assert far.__getitems__([50])[0].item() == 50
    server.down = True
    with pytest.raises(ValueError, match=r"a\.parquet: can't read row group 2: "):
        far.__getitems__([100])
    assert waits == [0.01, 0.02, 0.03] * 3, "it waits again once something was read"


def test_a_server_that_is_not_there_is_no_empty_folder(tmp_path: Path) -> None:
    with RangeServer(tmp_path) as server:
        pass
    with pytest.raises(ValueError, match=r"^http://[^ ]*: can't list its files: ClientConnectorError: "):
        rows(server.url, "*/*.parquet")


def test_what_waiting_does_not_cure_is_said_at_once(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path)
    far, waits = rows(server.url), []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    for url, line in (
        (f"{server.url}/train", r"/train has no \*\.nosuch"),
        (f"{server.url}/nosuch", r"/nosuch: can't list its files: FileNotFoundError"),
        ("htp://host/folder", "^htp://host/folder: ValueError: Protocol not known: htp$"),
        ("memory://nosuch", "^memory://nosuch: can't list its files: FileNotFoundError"),
    ):
        with pytest.raises(ValueError, match=line):
            rows(url, "*.nosuch")
    server.login = "me:pw"
    with pytest.raises(ValueError, match="can't list its files: ClientResponseError: 401"):
        rows(server.url)
    server.login = None
    (tmp_path / "train/a.parquet").write_bytes(b"no" * 9)
    with pytest.raises(ValueError, match=r"train/a\.parquet: can't read this Parquet file: ArrowInvalid: "):
        rows(server.url)
    (tmp_path / "train/b.parquet").unlink()
    with pytest.raises(ValueError, match=r"train/b\.parquet: can't read row group 0: ClientResponseError: 404"):
        far.__getitems__([200])
    assert waits == []


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/folder", "s3fs"), ("http://host/folder", "aiohttp")])
def test_a_package_that_is_missing_is_named(tmp_path: Path, url: str, package: str) -> None:
    code = f"""
import sys
sys.modules["{package}"] = None
from fairexp.datasets.parquet import ParquetRows
try:
    ParquetRows("{url}", "*.parquet", ["id"])
except ValueError as error:
    print(error)
"""
    assert run_python(code, tmp_path, {}) == f"{url}: needs {package}: pip install {package}\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@host/a?token=pw&x", "http://host/a"),
        ("401, url='https://pw@host:80/a?token=pw' (no)", "401, url='https://host:80/a' (no)"),
        ("s3://key:pw@bucket/a", "s3://bucket/a"),
        ("simplecache::http://me:p@w@host/a", "simplecache::http://host/a"),
        ("hf://datasets/a/b@~parquet/c", "hf://datasets/a/b@~parquet/c"),
        ("abfs://container@account.net/a", "abfs://container@account.net/a"),
    ],
)
def test_messages_have_no_secrets_of_a_url(text: str, shown: str) -> None:
    assert remote.without_secrets(text) == shown


def test_errors_have_no_secrets_of_a_url(server: RangeServer, tmp_path: Path) -> None:
    table(tmp_path)
    server.login = "me:canary"
    url = server.url.replace("://", "://me:canary@")
    far = rows(url)
    assert "canary" not in json.dumps(far.fingerprint)
    assert str(far.table.remote) == server.url
    server.down = True
    with pytest.raises(ValueError, match="503") as failed:
        far.__getitems__([0])
    assert "canary" not in str(failed.value)
    server.down = False
    with pytest.raises(ValueError, match="FileNotFoundError") as failed:
        rows(url, "nosuch/*.parquet")
    assert "canary" not in str(failed.value)


# --- runs ---

SMALL = (
    *("dataset=parquet_images", "dataset.image_size=4", "dataset.num_classes=41", "dataset.train.window=3"),
    *(
        "dataset.train.files=a.parquet",
        "dataset.eval.files=a.parquet",
        "model=mlp",
        "model.hidden=[4]",
        "schedule.warmup=0",
    ),
    *("trainer.global_batch_size=6", "trainer.max_steps=20", "trainer.max_epochs=null", "trainer.device=cpu"),
    *(
        "trainer.log_every=1",
        "trainer.eval_every=10",
        "checkpoint.every=10",
        "strategy=ddp",
        "launcher.num_processes=2",
    ),
    *("launcher.threads_per_process=1", "tracker=none"),
)


def test_a_run_reads_over_http_goes_on_and_notices_other_data(fairexp: Fairexp, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    parquet_images(data)
    words = ("train", *SMALL, "trainer.num_workers=2")
    near = fairexp(*words, f"dataset.root={data}", "dataset.expects=[]", f"runs_dir={tmp_path}/near")
    assert near.returncode == 0, near.stderr
    with RangeServer(data, login="me:canary") as server:
        far_words = (*words, f"dataset.root={server.url}")
        told = {"FSSPEC_HTTP": json.dumps({"client_kwargs": {"headers": {"Authorization": basic("me:canary")}}})}
        server.fails = ["503", "drop"]
        far = fairexp(*far_words, f"runs_dir={tmp_path}/far", env=told)
        assert far.returncode == 0, far.stderr
        whole = Trained(next((tmp_path / "far").glob("*-*")), far_words)
        assert whole.losses == Trained(next((tmp_path / "near").glob("*-*")), words).losses
        assert list(whole.steps) == list(range(1, 21))
        assert not [path for path in (tmp_path / "far").rglob("*") if path.is_file() and b"canary" in path.read_bytes()]

        copy = left_off(whole, tmp_path / "again")
        done = fairexp(*far_words, f"runs_dir={tmp_path}/again", env=told)
        assert done.returncode == 0, done.stderr
        assert "steps 10 -> 20 (resumed)" in done.stderr
        assert Trained(copy, far_words).losses == whole.losses

        left_off(whole, tmp_path / "other")
        changed = pa.table({"image": [picture(99)] * 41, "label": range(41)})
        pq.write_table(changed, data / "a.parquet", row_group_size=5)
        refused = fairexp(*far_words, f"runs_dir={tmp_path}/other", env=told)
        assert refused.returncode == 1
        assert "not the data that step_00000010 was trained on: bytes was " in refused.stderr


def basic(login: str) -> str:
    return f"Basic {base64.b64encode(login.encode()).decode()}"


@pytest.mark.parametrize(
    "url", ["http://me:canary@127.0.0.1:1/x", "simplecache::https://canary@host/x", "'http://host/x?t=canary'"]
)
def test_a_secret_in_a_config_is_refused_before_there_is_a_run_folder(
    fairexp: Fairexp, tmp_path: Path, url: str
) -> None:
    refused = fairexp("train", *SMALL, f"dataset.root={url}", f"runs_dir={tmp_path}/runs")
    assert refused.returncode == 2
    lines = refused.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fairexp: dataset.root (command line): a URL with a password or a '?'")
    assert "canary" not in refused.stdout + refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_still_looked_up_before_the_start(tmp_path: Path) -> None:
    for words, told in (
        ([*SMALL, "dataset.root=nosuch"], ["nosuch is no folder; expected there: train*.parquet, val*.parquet"]),
        (
            ["dataset=image_folder", "dataset.num_classes=2", "dataset.root=https://host/x"],
            ["https:/host/x is no folder"],
        ),
        ([*SMALL, "dataset.root=https://host/x"], []),
    ):
        found = problems(compose(words), 0, [], tmp_path)
        assert len(found) == len(told)
        assert all(line in problem for line, problem in zip(told, found, strict=True))


def test_a_scheme_that_nobody_knows_is_one_line_when_the_run_starts(fairexp: Fairexp, tmp_path: Path) -> None:
    started = fairexp("train", *SMALL, "dataset.root=htp://host/x", f"runs_dir={tmp_path}/runs")
    assert started.returncode == 1
    assert "dataset.train: htp://host/x: ValueError: Protocol not known: htp" in started.stderr
    assert "Traceback" not in started.stderr


def test_the_commands_of_the_documentation_pass_validation(tmp_path: Path) -> None:
    text = (REPO / "docs/data.md").read_text(encoding="utf-8").replace("\\\n", "")
    lines = re.findall(r"fairexp train ([^\n]*)", text)
    assert len(lines) == 3
    for line in lines:
        assert problems(compose(shlex.split(line)), 0, [], tmp_path) == []
