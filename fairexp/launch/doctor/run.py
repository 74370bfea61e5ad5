"""The verb `doctor`: runs the checks and prints a line each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fairexp.config import schema
from fairexp.errors import DONE, FAILED, INTERRUPTED
from fairexp.launch.doctor import cluster, machine
from fairexp.launch.doctor.check import Check, Finding, examine


def doctor(config: Mapping[str, Any], as_json: bool) -> int:
    """Prints what each check found, as lines or as one JSON list; 1 if one failed. `config`: its sections are valid."""
    launcher, trainer = schema.launcher_of(config), schema.read(schema.Trainer, config["trainer"])
    runs_dir = Path(config["runs_dir"]).expanduser().absolute()
    found: dict[str, Finding] = {}

    def passed(*checks: Check) -> bool:
        with closing(examine(checks)) as findings:
            for check, finding in findings:
                found[check.name] = finding
                if not as_json:
                    print(line(check.name, finding), flush=True)
        return all(found[check.name].state != "fail" for check in checks)

    try:
        passed(*of_installation(config["tracker"], runs_dir))
        if not isinstance(launcher, schema.Slurm):
            # the limit: to import torch twice from a cold network file system, and for ranks to meet
            passed(Check("GPUs", partial(machine.gpus, trainer), "torch or NCCL", 120.0))
        elif passed(Check("slurm", partial(cluster.slurm, launcher), "slurmctld")):
            passed(*of_cluster(launcher, trainer, runs_dir))
    except KeyboardInterrupt:
        return INTERRUPTED
    if as_json:
        print(json.dumps([{"check": name, **asdict(finding)} for name, finding in found.items()]))
    return FAILED if any(finding.state == "fail" for finding in found.values()) else DONE


def line(name: str, finding: Finding) -> str:
    """Without line breaks and control characters: parts of it come from file names and other programs."""
    text = f"{finding.seen} -> {finding.advice}" if finding.advice else finding.seen
    plain = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return f"{finding.state.replace('fail', 'FAIL'):<4}  {name:<10}  {plain}"


def of_installation(tracker: Mapping[str, Any], runs_dir: Path) -> list[Check]:
    """What matters wherever the run will be."""
    files = "the file system of runs_dir"
    return [
        Check("versions", machine.versions, "the installation"),
        Check("disk", partial(machine.disk, runs_dir), files),
        Check("writes", partial(machine.writes, runs_dir), files),
        Check("open files", machine.open_files, "the limits"),
        Check("wandb", partial(machine.wandb, tracker), "the file system of the home folder"),
        Check("git", machine.git, "git"),
    ]


def of_cluster(launcher: schema.Slurm, trainer: schema.Trainer, runs_dir: Path) -> list[Check]:
    """Where the cluster answers and the partition is there."""
    ranks = schema.num_ranks(launcher, trainer.device, 0)
    job = partial(cluster.test_job, launcher, ranks, trainer, runs_dir)
    return [
        Check("accounting", partial(cluster.accounting, launcher), "slurmdbd"),
        Check("partition", partial(cluster.partition, launcher), "slurmctld"),
        Check("nodes", partial(cluster.nodes, launcher, ranks), "slurmctld"),
        Check("preemption", partial(cluster.preemption, launcher, runs_dir), "slurmctld"),
        Check("test job", job, "slurmctld", cluster.JOB_WAIT_S + 40),
    ]
