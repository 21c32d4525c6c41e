"""`scale-sft bench step`: one training step of each contestant in turn.

race       rounds in which every contestant takes a step
breakdown  times the pieces of our own step
page       tables and plots
"""
