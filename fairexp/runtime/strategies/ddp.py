"""DistributedDataParallel: the whole model on every rank."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fairexp.runtime import init
from fairexp.runtime.dist import Place
from fairexp.runtime.strategies.single import Single


class DDP(Single):
    """Gradients are averaged in buckets while backward still runs."""

    needs_group = True

    def __init__(self, bucket_cap_mb: int = 25, static_graph: bool = False, find_unused_parameters: bool = False):
        self.bucket_cap_mb = bucket_cap_mb
        self.static_graph = static_graph
        self.find_unused_parameters = find_unused_parameters

    def wrap(self, model: nn.Module, here: Place, seed: int) -> nn.Module:
        init.materialize(model, here.device, seed)
        return DistributedDataParallel(
            model,
            device_ids=[here.device.index] if here.device.type == "cuda" else None,
            bucket_cap_mb=self.bucket_cap_mb,
            static_graph=self.static_graph,
            find_unused_parameters=self.find_unused_parameters,
            gradient_as_bucket_view=True,  # one copy of the gradients, not two
        )

    def last_micro_batch(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        assert isinstance(model, DistributedDataParallel)
        return nullcontext() if last else model.no_sync()
