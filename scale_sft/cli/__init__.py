"""The `scale-sft` command: one file per group of subcommands, `main` joins them.

commands      what groups have in common: errors in one line, whole descriptions
train         train
launch_files  launch-files
adapters      merge, export, inspect
arithmetic    add, scale, negate, intersect, difference, prune, overlap
bench         benchmarks: bench_step, bench_cost, bench_quality; bench_options holds what they share
checkpoints   checkpoint ls, verify
data          preprocess, data show, eval
plan          plan
recipes       recipes, schema
"""
