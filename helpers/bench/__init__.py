"""How fast we are, beside what a reader would use instead.

`python -m helpers.bench` prints our model's speed beside transformers'
DeepseekV3ForCausalLM: same weights, same threads, runs in turns, medians. A benchmark,
not a test: run it when nothing else runs. Ratios carry between machines, seconds do
not. May import every room; nothing imports it.
"""
