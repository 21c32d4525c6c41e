"""Held-out loss, generated answers, benchmark harness.

held_out        loss and perplexity
answers         greedy answers and exact match
evaluate_model  `scale-sft eval`
harness         lm-evaluation-harness
requantize      merge into few bits, and measure what that costs
"""
