"""Comparisons of this trainer with its alternatives: same model, data, dtype, batch and machine, in one run.

step/         one training step of each contestant in turn
memory/       bytes by part, and the peak of a step
reallocate    one reallocation, from 10^5 to 10^9 weights
scale/        ranks compared with the planner's arithmetic
sync          a sparse weight sync compared with a whole copy
quality/      held-out quality of each method at its best rate
gpu/          all of it that matters on a GPU, in one command
swap_cost     swapping an adapter compared with PEFT's hotswap
contestants   the methods compared; workload: the model and data they share
rows          JSON rows; show prints them as they arrive, page makes HTML with plots, markdown only tables
child, pool   measurements in processes of their own
device        the GPU or CPU measured; peak: exact memory peaks
"""
