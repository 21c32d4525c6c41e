"""`scale-sft bench quality`: held-out quality of each method at its best learning rate, and what the model retains.

measure      the tasks, their grids of methods and rates, and the seeds
contestants  the methods compared
tasks        what to learn, and the data that show what is retained
search       the rates of one contestant: a grid that grows, then seeds
peers        PEFT's adapters and dense fine-tuning, trained alike
worker       one run
updates      norms of what training has changed, and the share that a merge keeps
summary      best rates and those beyond them, means and intervals
table        tables and CSV
page         tables and plots
extras       the further reports: which runs they need
merging      adapters of two tasks added
drift        adapters merged and unmerged in bfloat16, again and again
"""
