"""`scale-sft bench gpu`: all facts about a GPU in one command, in order of value, within a time budget.

sections   what is measured, in which order
campaign   run them one after the other, each in a process of its own
child      such a process; preload: what those on a CPU share
lab        what a section works with: device, sizes, scratch folder, and a way to report
checks     versions and speed of the device; tests of the kernels; bits of attention; a large vocabulary
steps      steps of several contestants in turns, and whole cycles of reallocation
parts      kernel launches, waits and milliseconds by part of a step
memory     bytes and peaks; one reallocation
training   whole runs: the demo, and runs that must repeat their bits
page       tables of the rows
"""
