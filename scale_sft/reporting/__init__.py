"""The records of a run, and their display: metrics, console, report.

metrics        one record per step, reallocation and evaluation
metrics_file   metrics.jsonl
console        progress and tables in the terminal
records        read a run back from its files
weight_names   group weights by layer and kind
plots, style   the pictures
preference_plots  those of preference tuning
spread         where the entries are
html           parts of a page, from templates
run_report     report.html
"""
