"""`scale-sft bench quality`: what each method learns at its best rate.

measure      the grid of methods, rates and seeds
contestants  who takes part
peers        PEFT's adapters and dense fine-tuning, trained alike
worker       one run
summary      best rates and spreads
page         tables and plots
"""
