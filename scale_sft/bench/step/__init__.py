"""`scale-sft bench step`: one training step of each contestant in turn.

race              rounds in which every contestant takes a step
breakdown         times the pieces of our own step
page              tables and plots
pairs             random pairs of answers, for a race on pairs
pair_contestants  our steps of sft and dpo, and TRL's DPOTrainer with LoRA
pair_race         rounds on pairs, and the peak of a step
pair_page         their table
"""
