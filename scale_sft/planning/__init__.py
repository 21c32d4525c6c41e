"""Will it fit? Memory and traffic from shapes alone.

footprint    bytes of base, deltas and gradients
placement    replicate or shard
planner      `scale-sft plan`
suggestions  the smallest change that fits
meta_trace   one step traced on the meta device
"""
