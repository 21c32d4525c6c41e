"""This trainer compared with what one would use instead: same model, data, dtype, batch and machine, in one run.

step/         one training step of each contestant in turn
memory/       bytes by part, and the peak of a step
reallocate    one reallocation, from 10^5 to 10^9 weights
scale/        ranks compared with the planner's arithmetic
quality/      what each method learns at its best rate
swap_cost     swapping an adapter compared with PEFT's hotswap
contestants   who takes part; workload: on what
rows          JSON rows; show prints them as they come, page makes HTML with plots, markdown tables alone
child, pool   measurements in processes of their own
peak          exact memory peaks
"""
