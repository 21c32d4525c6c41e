"""What a run learns from: the loss of a global batch, as sums over micro-batches.

losses          the equations of dpo, ipo, orpo and kto, over log-probabilities of whole answers
log_probabilities  of answers under a model, and the pass over all data that measures them
reference       the weights of the reference, put in place for a while; its log-probabilities, kept in the cache
layouts         how pairs are laid out in rows, proven on the loaded model
rewards         what is reported of a batch: rewards, margins, accuracy, distance from the reference
tokens          sft: cross entropy per target token
preference      dpo, ipo, orpo, kto
"""
