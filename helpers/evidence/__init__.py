"""What is known and what was measured.

facts    published figures with their sources (facts.toml, sources.toml, configs.toml)
claims   the article's claims and their verdicts (claims.toml)
cost     FLOPs, rates and peaks, from a config
results  recorded measurements, and whether the code that made them is still the same

`facts` imports `helpers.checks` only, so that every room may ask for a figure. `cost`
and `results` stand above `v3` and `training`.
"""
