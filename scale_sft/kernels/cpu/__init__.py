"""Kernels in C for CPUs, compiled on first use.

compile          find a compiler, build, load
sampled_columns  few entries of a gradient by dot products (appendix B)
topk             entries of largest magnitude
drop_grow        drop and grow of one weight
updates          AdamW and SM3, fused with the write
"""
