"""How fast we are, beside what a reader would use instead.

`python -m helpers.bench` prints a table of ours, theirs, the ratio and its spread:
training, prefill and decoding beside transformers' DeepseekV3ForCausalLM, a GRPO step
beside TRL's, a MoE layer as its experts grow, and two notebooks at once beside one. A
name behind the command picks a row. A benchmark, not a test: run it when nothing else
runs. Ratios carry between machines, seconds do not.

timing             jobs in turns, rows of the table
transformers_rows  same weights, same threads, both models
trl_row            one GRPO step, if trl is installed
own_rows           ours beside ours
worker             the process that `own_rows` starts twice

May import every room; nothing imports it.
"""
