"""The rows of a parameter that fully_shard has dealt to the ranks: which are here, and all of them again."""

import torch.distributed as dist


def local_rows(parameter):
    """This rank's rows of a sharded parameter, and the number of the first: fully_shard gives ceil(rows / ranks)
    consecutive rows to each rank."""
    mesh, shard_dim = parameter.device_mesh, parameter.device_mesh.ndim - 1  # HSDP: (replicas, shards)
    each = -(-parameter.shape[0] // mesh.size(shard_dim))
    return parameter.to_local().data, min(each * mesh.get_local_rank(shard_dim), parameter.shape[0])


def whole(parameter, dtype, keep):
    """All rows of a sharded parameter in `dtype`, where `keep`, else None. Collective. Rank after rank sends its rows:
    gathered at once, they would stand twice in memory under gloo, and on every rank."""
    local, group = local_rows(parameter)[0].to(dtype), parameter.device_mesh.get_group(-1)
    if group.size() == 1:
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
