"""`scale-sft bench memory`: bytes by part and the peak of a step, each in its own process.

measure  ask a worker for each case; tables and plots
worker   one measurement in a fresh process
state    bytes of a contestant's state, by part
"""
