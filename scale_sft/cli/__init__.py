"""The `scale-sft` command: one file per group of subcommands, `main` joins them.

train         train, in this process or in several
launch_files  launch-files ls, cp
chat          chat
adapters      merge, export, inspect
arithmetic    add, scale, negate, intersect, difference, prune, overlap
bench         benchmarks: bench_step, bench_cost, bench_quality, bench_gpu; bench_options: what they share
checkpoints   checkpoint ls, verify
data          preprocess, data show, eval
models        models check
tokens        models add-tokens
plan          plan
recipes       recipes, schema
commands      shared by every group of commands: one-line errors, suggestions, whole descriptions
"""
