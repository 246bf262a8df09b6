"""The part of a parameter that fully_shard has given to this rank, its shard: consecutive rows of the matrix. Where it
lies in the whole, and the whole again. A parameter that was not sharded is its own shard."""

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def local_rows(parameter):
    """This rank's shard of a parameter, and the number of its first row in the whole. fully_shard gives
    ceil(rows / ranks) rows to each rank, in the order of the ranks."""
    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    mesh, shard_dim = parameter.device_mesh, parameter.device_mesh.ndim - 1  # HSDP: (copies, shards)
    each = -(-parameter.shape[0] // mesh.size(shard_dim))
    return parameter.to_local().data, min(each * mesh.get_local_rank(shard_dim), parameter.shape[0])


def whole(parameter, dtype, keep):
    """All of a sharded parameter in `dtype` on ranks with `keep`, None on the others. Collective.

    One rank after the other sends its shard. torch's own gathering would hold the parameter twice under gloo, and on
    every rank."""
    local = local_rows(parameter)[0].to(dtype)
    if not isinstance(parameter, DTensor) or (group := parameter.device_mesh.get_group(-1)).size() == 1:
        return local
    rows, each = parameter.shape[0], -(-parameter.shape[0] // group.size())
    full = local.new_empty(parameter.shape) if keep else None
    for owner, start in enumerate(range(0, rows, each)):
        mine, stop = owner == group.rank(), min(start + each, rows)
        piece = local if mine else full[start:stop] if keep else local.new_empty(stop - start, *parameter.shape[1:])
        dist.broadcast(piece, group=group, group_src=owner)
        if mine and keep:
            full[start:stop] = local
    return full


def let_go(net):
    """Keep only this rank's shards of a model's parameters in memory."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
