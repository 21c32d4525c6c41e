"""`scale-sft bench quality`: held-out quality of each method at its best learning rate.

measure      the grid of methods, rates and seeds
contestants  the methods compared
peers        PEFT's adapters and dense fine-tuning, trained alike
worker       one run
summary      best rates and spreads
page         tables and plots
"""
