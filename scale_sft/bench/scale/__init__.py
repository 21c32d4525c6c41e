"""`scale-sft bench scale`: ranks compared with the planner's arithmetic.

measure  launch the worlds and collect their rows
worker   one rank, with a clock around its collectives
page     tables and plots
"""
