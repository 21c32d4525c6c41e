"""Held-out loss, generated answers, benchmarks.

held_out        loss and perplexity
answers         greedy answers and exact match
padding         a proof that padding does not change answers
evaluate_model  `scale-sft eval`
conversation    `scale-sft chat`
harness         benchmarks of lm-evaluation-harness
requantize      merge in 4 or 8 bits, and measure what that costs
"""
