"""Every option, once.

fields         how an option is declared, and its checks
options        the dataclasses: default, help, check
methods        what belongs to the name of a method
objective_options  of these, the section of the objective: sft, or preferences
sparse_options     of these, the section of the sparse deltas
loading        recipe + command line -> Config
rules          rules over several options
click_options  command-line options made from the dataclasses
schema         JSON Schema of recipes
plain_yaml     YAML without guesses
recipes        the recipes that ship
spelling       the nearest known name to a misspelt one
"""
