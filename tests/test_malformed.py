"""What is wrong with a command line or a config is said in one line a problem: what, where, what is allowed, the nearest match;
before anything starts, with exit code 2. Beside each mistake stands the mended command, which passes."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fairexp import cli
from fairexp.config.compose import compose
from fairexp.config.diagnose import place
from fairexp.config.groups import OUR_CONFIGS, groups
from fairexp.config.provenance import line_of
from fairexp.config.validate import problems

VIT = "it takes: image_size, patch_size, in_channels, num_classes, width, depth, num_heads, mlp_ratio, dropout, pool"
IDX = "train-images-idx3-ubyte*, train-labels-idx1-ubyte*, t10k-images-idx3-ubyte*, t10k-labels-idx1-ubyte*"
TRUSTED = "configs may name fairexp, torch.nn, torch.optim, torch.utils.data and packages in the working folder"
SEED = "takes int >= 0 and <= 9223372036854775807"
WARMUP = "takes steps (int >= 0) or a fraction of the run (float >= 0 and < 1)"
FLAGS = "there are: --config-dir, --config-name, --fresh, --json, --trust"
# where a mistake stands: `<dataset/mnist_idx.yaml root>` is FILE:LINE of that key in configs/, `<model>` the group's options
COMMANDS: list[tuple[str, str, str]] = [
    # the mistaken command, its messages, the mended command
    # --- verbs and flags
    ("trian", "trian: no such verb; nearest: train; there are: config, eval, list, show, train", "train"),
    ("train --frehs", f"--frehs: no such flag of this verb; nearest: --fresh; {FLAGS}", "train --fresh"),
    ("train -x", f"-x: no such flag of this verb; {FLAGS}", "train"),
    ("train --trust", "--trust: needs a value", "train --trust mine"),
    ("config --jsn", "--jsn: no such flag of this verb; nearest: --json; there are: --config-dir, --config-name, --json", "config --json"),
    ("list nosuch", "list: no such folder: nosuch", "list theirs"),
    ("list a b", "list: takes one folder of runs, got a b", "list"),
    ("train --config-dir nosuch", "--config-dir {cwd}/nosuch: no such folder", "train --config-dir theirs"),
    ("train --config-dir file", "--config-dir {cwd}/file: no such folder", "train --config-dir theirs"),
    ("train --config-name tran", "--config-name tran: no such config; nearest: train; there are: train", "train --config-name train"),
    ("train hydra.searchpath=[file://nosuch]", "hydra.searchpath: no such folder: nosuch", "train hydra.searchpath=[file://theirs]"),
    # --- grammar
    ("train ''", "'': an empty override; write key=value", "train seed=1"),
    ("train =value", "=value: has no key before the '='; write key=value", "train name=value"),
    ("train trainer.max_steps", "trainer.max_steps: has no value; write trainer.max_steps=VALUE", "train trainer.max_steps=5"),
    ("train model.depth=4 fast now", "fast: has no value; write fast=VALUE\nnow: has no value; write now=VALUE", "train model.depth=4"),
    ("train tracker.tags=[a,b", "tracker.tags=[a,b: '[' and ']' don't match", "train tracker.tags=[a,b]"),
    ("train '+model={depth: 2'", "+model={depth: 2: '{' and '}' don't match", "train '++model={depth: 2}'"),
    ('train "name=\'abc"', "name='abc: a ' is not closed", "train \"name='abc'\""),
    ("train trainer.maх_steps=5", "trainer.maх_steps=5: 'х' is CYRILLIC SMALL LETTER HA (U+0445), not ASCII", "train trainer.max_steps=5"),
    ("train –-fresh", "–-fresh: '–' is EN DASH (U+2013), not ASCII", "train --fresh"),
    (
        "train name=Müller",
        "name=Müller: token recognition error at: 'ü'; quote what has more than letters, digits and _-+.:/ as \"name='...'\"",
        "train \"name='Müller'\"",
    ),
    ("train seed=1,2", "seed=1,2: names several values, and train takes one; quote it if it is one value", "train seed=1"),
    ("train model=vit,mlp", "model=vit,mlp: names several values, and train takes one; quote it if it is one value", "train model=mlp"),
    (
        "train name=a,b 'seed=range(1, 3)'",
        "name=a,b: names several values, and train takes one; quote it if it is one value\n"
        "seed=range(1, 3): names several values, and train takes one; quote it if it is one value",
        "train \"name='a,b'\" seed=1",
    ),
    # --- keys, groups and options
    (
        "train trainer.max_stesp=5",
        "trainer.max_stesp=5: trainer has no 'max_stesp'; nearest: max_steps, max_epochs",
        "train trainer.max_steps=5",
    ),
    ("train optimzer.lr=1", "optimzer.lr=1: the config has no 'optimzer'; nearest: optimizer", "train optimizer.lr=1"),
    ("train modle=mlp", "modle=mlp: the config has no 'modle'; nearest: model", "train model=mlp"),
    ("train +modle=mlp", "modle (command line): no such section; nearest: model", "train model=mlp"),
    ("train +trainer.evry=3", "trainer.evry (command line): no such setting", "train +checkpoint.every=3"),
    ("train model=vitt", "model=vitt: no such option of model; nearest: vit, vit_tiny; there are: <model>", "train model=vit_tiny"),
    (
        "train +experiment=vit_digit",
        "experiment=vit_digit: no such option of experiment; nearest: vit_digits, resnet_digits; there are: <experiment>",
        "train +experiment=vit_digits",
    ),
    ("train tracker=null", "tracker=null: no such option of tracker; there are: <tracker>", "train tracker=none"),
    ("train trainer=3", "trainer=3: no such option of trainer; there are: <trainer>", "train trainer=default"),
    ("train model.depth.x=3", "model.depth.x=3: model.depth is a value and has no 'x'", "train model.depth=3"),
    (
        "train optimizer.betas.5=0.9",
        "optimizer.betas.5=0.9: optimizer.betas is a list of 2 and has no '5'",
        "train optimizer.betas.1=0.9",
    ),
    ("train ~modle", "~modle: the config has no 'modle'; nearest: model", "train ~debug"),
    ("train ~trainer.log_every", "trainer.log_every: missing; takes int >= 1", "train trainer.log_every=1"),
    ("train ~trainer", "trainer: missing; there are: <trainer>", "train trainer=default"),
    ("train ~seed", f"seed: missing; {SEED}", "train seed=3"),
    ("train ~dataset.eval", "dataset.eval: missing; takes a section with a _target_", "train dataset.augment=null"),
    (
        "train dataset=image_folder",
        "dataset.root (<dataset/image_folder.yaml root>): ??? must be given: add dataset.root=...\n"
        "dataset.num_classes (<dataset/image_folder.yaml num_classes>): ??? must be given: add dataset.num_classes=...",
        "train dataset=image_folder dataset.root=images dataset.num_classes=2",
    ),
    # --- types and bounds of what fairexp reads
    ("train trainer.max_steps=five", "trainer.max_steps (command line): takes int >= 1 or null, got 'five'", "train trainer.max_steps=5"),
    ("train trainer.max_steps=1e3", "trainer.max_steps (command line): takes int >= 1 or null, got 1000.0", "train trainer.max_steps=1000"),
    ("train trainer.max_steps=[1,2]", "trainer.max_steps (command line): takes int >= 1 or null, got [1, 2]", "train trainer.max_steps=1"),
    ("train trainer.max_steps=true", "trainer.max_steps (command line): takes int >= 1 or null, got true", "train trainer.max_steps=1"),
    ("train trainer.max_steps=", "trainer.max_steps (command line): takes int >= 1 or null, got ''", "train trainer.max_steps=null"),
    ("train trainer.deterministic=2", "trainer.deterministic (command line): takes bool, got 2", "train trainer.deterministic=yes"),
    ("train runs_dir=null", "runs_dir (command line): takes str, got null", "train runs_dir=runs"),
    ("train seed=-1", f"seed (command line): {SEED}, got -1", "train seed=0"),
    ("train trainer.global_batch_size=-1", "trainer.global_batch_size (command line): takes int >= 1, got -1", "train trainer.global_batch_size=1"),
    ("train trainer.log_every=0", "trainer.log_every (command line): takes int >= 1, got 0", "train trainer.log_every=1"),
    ("train checkpoint.keep_last=0", "checkpoint.keep_last (command line): takes int >= 1, got 0", "train checkpoint.keep_last=1"),
    (
        "train trainer.grad_clip_norm=0",
        "trainer.grad_clip_norm (command line): takes float > 0 or null, got 0",
        "train trainer.grad_clip_norm=null",
    ),
    ("train trainer.ema_decay=1.5", "trainer.ema_decay (command line): takes float >= 0 and <= 1 or null, got 1.5", "train trainer.ema_decay=0.9"),
    ("train trainer.precision=fp8", "trainer.precision (command line): takes one of fp32, bf16, fp16, got 'fp8'", "train trainer.precision=bf16"),
    ("train trainer.compile=all", "trainer.compile (command line): takes one of off, blocks, whole, got 'all'", "train trainer.compile=whole"),
    (
        "train trainer.max_epochs=null",
        "trainer.max_steps (<trainer/default.yaml max_steps>): null, and trainer.max_epochs too; give one of them",
        "train trainer.max_epochs=null trainer.max_steps=5",
    ),
    ("train name=a/b", "name (command line): 'a/b' can't be part of a folder's name", "train name=a_b"),
    ("train runs_dir=file/runs", "runs_dir: can't make {cwd}/file/runs/vit_digits-<id>: Not a directory", "train runs_dir=more/runs"),
    # --- what a _target_ is and takes
    (
        "train model.widht=3",
        "model.widht=3: model has no 'widht'; nearest: width; there are: _target_, depth, dropout, image_size, in_channels, "
        "mlp_ratio, num_classes, num_heads, patch_size, pool, width; +model.widht=3 adds it",
        "train model.width=3",
    ),
    ("train +model.widht=3", f"model.widht (command line): ViT takes no 'widht'; nearest: width; {VIT}", "train +model.width=3"),
    ("train ~model.num_classes", "model._target_ (<model/vit.yaml _target_>): ViT needs 'num_classes'", "train ~model.pool"),
    ("train model.depth=2.5", "model.depth (command line): ViT: 'depth' takes int, got 2.5", "train model.depth=2"),
    ("train model=mlp model.hidden=8", "model.hidden (command line): MLP: 'hidden' takes Sequence[int], got 8", "train model=mlp model.hidden=[8]"),
    ("train model.pool=max", "model.pool (command line): ViT: 'pool' takes Literal['cls', 'mean'], got 'max'", "train model.pool=mean"),
    ("train optimizer.lr=high", "optimizer.lr (command line): AdamW: 'lr' takes a number, got 'high'", "train optimizer.lr=1e-3"),
    ("train optimizer.lr=nan", "optimizer.lr (command line): takes a finite number, got nan", "train optimizer.lr=0"),
    ("train optimizer.lr=inf", "optimizer.lr (command line): takes a finite number, got inf", "train optimizer.lr=1"),
    ("train optimizer.lr=-1", "optimizer.lr (command line): takes a number >= 0, got -1", "train optimizer.lr=0.1"),
    ("train optimizer.weight_decay=-1", "optimizer.weight_decay (command line): takes a number >= 0, got -1", "train optimizer.weight_decay=0"),
    ("train model.dropout=1.5", "model.dropout (command line): takes a number >= 0 and <= 1, got 1.5", "train model.dropout=0.5"),
    ("train model.depth=0", "model.depth (command line): takes a number >= 1, got 0", "train model.depth=1"),
    ("train model=mlp model.hidden=[8,0]", "model.hidden.1 (command line): takes a number >= 1, got 0", "train model=mlp model.hidden=[8,1]"),
    ("train dataset.augment=3", "dataset.augment (command line): takes a section with a _target_, got 3", "train dataset.augment=null"),
    ("train schedule.warmup=ten", "schedule.warmup (command line): cosine: 'warmup' takes int | float, got 'ten'", "train schedule.warmup=10"),
    ("train schedule.warmup=1.5", f"schedule.warmup (command line): {WARMUP}, got 1.5", "train schedule.warmup=0.5"),
    (
        "train schedule.warmup=100 trainer.max_steps=10",
        "schedule.warmup (command line): 100 makes 100 steps, but trainer.max_steps is 10",
        "train schedule.warmup=10 trainer.max_steps=100",
    ),
    (
        "train schedule=wsd schedule.warmup=6 schedule.decay=0.5 trainer.max_steps=10",
        "schedule.decay (command line): 0.5 makes 11 steps, but trainer.max_steps is 10",
        "train schedule=wsd schedule.warmup=5 schedule.decay=0.5 trainer.max_steps=10",
    ),
    ("train model._target_=ViT", "model._target_ (command line): 'ViT' is not a dotted name such as torch.optim.AdamW", "train"),
    (
        "train model._target_=fairexp.models.vitt.ViT",
        "model._target_ (command line): no module named 'fairexp.models.vitt'; nearest: fairexp.models.vit",
        "train model._target_=fairexp.models.vit.ViT",
    ),
    (
        "train optimizer._target_=torch.optim.Adma",
        "optimizer._target_ (command line): torch.optim has no Adma; nearest: Adamax, Adam, RAdam",
        "train optimizer._target_=torch.optim.Adam",
    ),
    (
        "train loop._target_=os.system",
        f"loop._target_ (command line): 'os.system' is not called: {TRUSTED}; if you trust everything in os, add --trust os",
        "train loop._target_=fairexp.runtime.loop.fit",
    ),
    (
        "train loop._target_=torch.load",
        f"loop._target_ (command line): 'torch.load' is not called: {TRUSTED}; if you trust everything in torch, add --trust torch",
        "train loop._target_=fairexp.runtime.loop.overfit_one_batch +loop.steps=3 +loop.below=1",
    ),
    (
        "train task._target_=rich.text.Text ~task.label_smoothing ~task.topk",
        f"task._target_ (command line): 'rich.text.Text' is not called: {TRUSTED}; if you trust everything in rich, add --trust rich",
        "train task._target_=rich.text.Text ~task.label_smoothing ~task.topk --trust rich",
    ),
    # --- processes, batches, devices
    (
        "train launcher.num_processes=2",
        "launcher.num_processes (command line): 2 processes with strategy=single; add strategy=ddp or strategy=fsdp",
        "train launcher.num_processes=2 strategy=ddp",
    ),
    (
        "train launcher=inline launcher.num_processes=2 strategy=ddp",
        "launcher.num_processes (command line): 2, but launcher=inline is this one process; use launcher=local",
        "train launcher=local launcher.num_processes=2 strategy=ddp",
    ),
    ("train launcher.nodes=2", "launcher.nodes (command line): 2, but launcher=local has one node", "train launcher.nodes=1"),
    (
        "train strategy=ddp launcher.num_processes=2 trainer.global_batch_size=127",
        "trainer.global_batch_size (command line): 127 is not a multiple of 2 processes; nearest: 126 or 128",
        "train strategy=ddp launcher.num_processes=2 trainer.global_batch_size=126",
    ),
    (
        "train trainer.micro_batch_size=48",
        "trainer.micro_batch_size (command line): 48 does not divide the 128 samples a rank of global_batch_size 128; "
        "nearest global_batch_size: 96 or 144",
        "train trainer.micro_batch_size=48 trainer.global_batch_size=96",
    ),
    (
        "train strategy=fsdp strategy.shard_size=3 launcher.num_processes=4",
        "strategy.shard_size (command line): 3 does not divide 4 processes; takes 1, 2, 4",
        "train strategy=fsdp strategy.shard_size=2 launcher.num_processes=4",
    ),
    ("train trainer.device=cuda", "trainer.device (command line): cuda, but this machine shows no GPU; use auto or cpu", "train trainer.device=cpu"),
    # --- data folders
    (
        "train dataset=mnist_idx",
        "dataset.root (<dataset/mnist_idx.yaml root>): ??? must be given: add dataset.root=...",
        "train dataset=mnist_idx dataset.root=idx",
    ),
    (
        "train dataset=mnist_idx dataset.root=nosuch",
        f"dataset.root (command line): {{cwd}}/nosuch is no folder; expected there: {IDX}",
        "train dataset=mnist_idx dataset.root=idx",
    ),
    (
        "train dataset=mnist_idx dataset.root=file",
        f"dataset.root (command line): {{cwd}}/file is a file, not a folder; expected there: {IDX}",
        "train dataset=mnist_idx dataset.root=idx",
    ),
    (
        "train dataset=mnist_idx dataset.root=empty",
        f"dataset.root (command line): {{cwd}}/empty holds nothing of the data; expected there: {IDX}",
        "train dataset=mnist_idx dataset.root=idx",
    ),
    (
        "train dataset=image_folder dataset.num_classes=2 dataset.root=half",
        "dataset.root (command line): {cwd}/half lacks val/*/*; expected there: train/*/*, val/*/*",
        "train dataset=image_folder dataset.num_classes=2 dataset.root=images",
    ),
    # --- several at once
    (
        "train model=vitt trainer.max_stesp=3 modle=mlp",
        "model=vitt: no such option of model; nearest: vit, vit_tiny; there are: <model>\n"
        "trainer.max_stesp=3: trainer has no 'max_stesp'; nearest: max_steps, max_epochs\n"
        "modle=mlp: the config has no 'modle'; nearest: model",
        "train model=mlp trainer.max_steps=3",
    ),
    (
        "train trainer.precision=fp8 trainer.log_every=0 +trainer.x=1 optimizer.lr=nan +model.widht=3 launcher.num_processes=2",
        "trainer.x (command line): no such setting\n"
        "trainer.log_every (command line): takes int >= 1, got 0\n"
        "trainer.precision (command line): takes one of fp32, bf16, fp16, got 'fp8'\n"
        "optimizer.lr (command line): takes a finite number, got nan\n"
        f"model.widht (command line): ViT takes no 'widht'; nearest: width; {VIT}\n"
        "launcher.num_processes (command line): 2 processes with strategy=single; add strategy=ddp or strategy=fsdp",
        "train trainer.precision=bf16 trainer.log_every=1 optimizer.lr=1 strategy=ddp launcher.num_processes=2",
    ),
]
GLOBAL = "# @package _global_\n"
# an experiment of the user's, theirs/experiment/mine.yaml: the mistaken text, its messages, the mended text
EXPERIMENTS: list[tuple[str, str, str]] = [
    (
        GLOBAL + "model:\n  depth: 2\n  widht: 64\n",
        f"model.widht (mine:4): ViT takes no 'widht'; nearest: width; {VIT}",
        GLOBAL + "model:\n  depth: 2\n  width: 64\n",
    ),
    (
        GLOBAL + "trainr:\n  max_steps: 3\n",
        "trainr (mine:3): no such section; nearest: trainer, tracker",
        GLOBAL + "trainer:\n  max_steps: 3\n",
    ),
    (
        GLOBAL + "trainer:\n  max_stesp: 3\n  log_every: often\n",
        "trainer.max_stesp (mine:3): no such setting; nearest: max_steps, max_epochs\n"
        "trainer.log_every (mine:4): takes int >= 1, got 'often'",
        GLOBAL + "trainer:\n  max_steps: 3\n  log_every: 1\n",
    ),
    (GLOBAL + "trainer: 3\n", "trainer (mine:2): takes a section, got 3", GLOBAL + "trainer: {max_steps: 3}\n"),
    (
        GLOBAL + "optimizer:\n  lr: 1e-3x\n",
        "optimizer.lr (mine:3): AdamW: 'lr' takes a number, got '1e-3x'",
        GLOBAL + "optimizer:\n  lr: 1e-3\n",
    ),
    (
        GLOBAL + "model:\n  depth: ${trainer.num_worker}\n",
        "model.depth (mine:3): ${trainer.num_worker} leads nowhere: Interpolation key 'trainer.num_worker' not found; "
        "nearest: trainer.num_workers",
        GLOBAL + "model:\n  depth: ${checkpoint.keep_last}\n",
    ),
    (
        GLOBAL + "model:\n  depth: ${oc.env:NO_SUCH}\n",
        "model.depth (mine:3): ${oc.env:NO_SUCH} leads nowhere: KeyError raised while resolving interpolation: "
        "\"Environment variable 'NO_SUCH' not found\"",
        GLOBAL + "model:\n  depth: ${oc.decode:${oc.env:NO_SUCH,3}}\n",
    ),
    (
        GLOBAL + "model:\n  depth: [2\ntrainer:\n  max_steps: 3\n",
        "mine:4: expected ',' or ']', but got ':', in what begins on line 3",
        GLOBAL + "model:\n  depth: 2\ntrainer:\n  max_steps: 3\n",
    ),
    (
        GLOBAL + "model:\n\tdepth: 2\n",
        "mine:3: found character '\\t' that cannot start any token",
        GLOBAL + "model:\n  depth: 2\n",
    ),
    (
        GLOBAL + "model: &anchor\n  depth: *nowhere\n",
        "mine:3: found undefined alias 'nowhere'",
        GLOBAL + "trainer:\n  max_steps: &anchor 3\n  eval_every: *anchor\n",
    ),
    (
        GLOBAL + "trainer:\n  max_steps: 3\n  log_every: 1\n  max_steps: 4\n",
        "mine:5: found duplicate key max_steps, in what begins on line 3",
        GLOBAL + "trainer:\n  max_steps: 3\n  log_every: 1\n",
    ),
    (
        GLOBAL + "defaults:\n  - override /model: vitt\n",
        "mine:3: no such option of model: vitt; nearest: vit, vit_tiny; there are: <model>",
        GLOBAL + "defaults:\n  - override /model: vit\n",
    ),
    (
        GLOBAL + "defaults:\n  - override /modle: vit\n",
        "mine:3: no such group: modle; nearest: model; there are: <>",
        GLOBAL + "defaults:\n  - override /model: vit\n",
    ),
    (
        GLOBAL + "defaults:\n  - override model: mlp\n",
        "mine:3: no such group: experiment/model; write 'override /model'",
        GLOBAL + "defaults:\n  - override /model: mlp\n",
    ),
    (
        GLOBAL + "defaults:\n  - /model: mlp\n",
        "mine:3: model is chosen already; write 'override /model'",
        GLOBAL + "defaults:\n  - override /model: mlp\n",
    ),
    (
        GLOBAL + "defaults:\n  - override /dataset/part: one\n",
        "mine:3: nothing chooses dataset/part that this could override; write '/dataset/part'",
        GLOBAL + "defaults:\n  - override /dataset: digits\n",
    ),
    (
        GLOBAL + "defaults:\n  - viit_digits\n",
        "mine:3: no such option of experiment: viit_digits; nearest: vit_digits; there are: mine, <experiment>",
        GLOBAL + "defaults:\n  - vit_digits\n",
    ),
    (
        "trainer:\n  max_steps: 3\n",
        "experiment (mine:1): sets nothing of the run; the file must begin with '# @package _global_' and hold "
        "'key: value' lines",
        GLOBAL + "trainer:\n  max_steps: 3\n",
    ),
    (
        "- trainer\n",
        "experiment (mine:1): sets nothing of the run; the file must begin with '# @package _global_' and hold "
        "'key: value' lines",
        GLOBAL + "name: other\n",
    ),
    (
        GLOBAL + "defaults:\n  - override /model: vitt\n  - override /modle: mlp\n",
        "mine:3: no such option of model: vitt; nearest: vit, vit_tiny; there are: <model>\n"
        "mine:4: no such group: modle; nearest: model; there are: <>",
        GLOBAL + "defaults:\n  - override /model: vit\n  - override /task: classification\n",
    ),
    (
        GLOBAL + "model:\n  _target_: net.Nett\n",
        "model._target_ (mine:3): net has no Nett; nearest: Net",
        GLOBAL + "model:\n  _target_: fairexp.models.vit.ViT\n",
    ),
    (
        GLOBAL + "task:\n  _target_: net.Net\n  topk: [1]\n",
        "task.label_smoothing (<task/classification.yaml label_smoothing>): Net takes no 'label_smoothing'; it takes: topk, depth\n"
        "task._target_ (mine:3): Net needs 'depth'",
        GLOBAL + "defaults:\n  - override /task: null\ntask:\n  _target_: net.Net\n  topk: [1]\n  depth: 2\n",
    ),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module and a config folder of the user's, and folders of data that are whole, half and empty."""
    for name in ("theirs/experiment/", "theirs/dataset/part/one.yaml", "empty/", "file", "half/train/cat/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir(parents=True) if name.endswith("/") else (tmp_path / name).write_text("")
    for name in (*IDX.replace("*", "").split(", "), "train/cat/1.png", "val/cat/1.png"):
        file = tmp_path / ("idx" if "idx" in name else "images") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "net.py").write_text("class Net:\n    def __init__(self, topk: list[int], depth: int): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path
