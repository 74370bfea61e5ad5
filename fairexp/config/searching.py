"""Hydra's search path over our configs and the user's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra


@contextmanager
def searching(config_dirs: Sequence[Path]) -> Iterator[None]:
    """Inside, hydra.compose searches the folders in order; the later ones as Hydra's own --config-dir adds them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hydra-core 1.4 announces that 1.5 won't take a version base
        version.setbase("1.3")
    primary, *others = config_dirs
    path = create_config_search_path(str(primary))
    for folder in others:
        path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2(task_name="fairexp", config_search_path=path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        if before is not None:
            GlobalHydra.instance().initialize(before)
