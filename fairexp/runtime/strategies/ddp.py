"""DistributedDataParallel: the whole model on every rank."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
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
        parallel = DistributedDataParallel(
            model,
            device_ids=[here.device.index] if here.device.type == "cuda" else None,
            bucket_cap_mb=self.bucket_cap_mb,
            static_graph=self.static_graph,
            find_unused_parameters=self.find_unused_parameters,
            gradient_as_bucket_view=True,  # one copy of the gradients, not two
        )
        if not self.static_graph:
            _settle_buckets(parallel)
        return parallel

    def last_micro_batch(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        assert isinstance(model, DistributedDataParallel)
        return nullcontext() if last else model.no_sync()


def _settle_buckets(parallel: DistributedDataParallel) -> None:
    """Fixes for good in which order the gradients are summed.

    DDP packs its buckets anew after its first backward, in the order in which gradients became ready. With more than two
    ranks the order of a sum depends on its place in the bucket, so the first step after a restart would have other last bits
    than the same step of a run that wasn't interrupted. Two passes over a graph that only touches each parameter, last
    registered first, let it pack them now.
    """
    module = parallel.module
    own = module.forward

    def touch() -> Tensor:
        return sum((p.flatten()[:1] * 0).sum() for p in module.parameters() if p.requires_grad)  # type: ignore[return-value]

    module.forward = touch
    try:
        for _ in range(2):
            parallel().backward()
    finally:
        module.forward = own
    for parameter in module.parameters():
        parameter.grad = None
