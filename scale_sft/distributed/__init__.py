"""Ranks, sharding, failures; the only importer of accelerate, deepspeed and torch.distributed.

world      what the launcher says
cluster    the ranks of a run and what they do together
sharding   DeepSpeed ZeRO-3
heartbeat  which rank has stopped making progress
signals    signals that ask a run to stop
exit       end a process that joined a group
"""
