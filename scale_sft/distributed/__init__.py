"""Ranks, sharding, failures; the only importer of accelerate, deepspeed and torch.distributed.

world       what the launcher says
agreement   what ranks do together: sum, gather, agree
candidates  the largest entries of a gradient that is summed over ranks
sharding    the frozen base, replicated or in ZeRO-3 shards
cluster     the ranks of one run, from joining to leaving
existing    the ranks of a process group that the caller has started
heartbeat   which rank has stopped making progress
tracking    experiment trackers
signals     signals that ask a run to stop
exit        end a process that joined a group
launcher    accelerate launch, quietly
"""
