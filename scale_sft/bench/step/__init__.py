"""`scale-sft bench step`: one training step of each contestant in turn.

race       rounds in which every contestant takes a step
breakdown  where the time of our own step goes
page       tables and plots
"""
