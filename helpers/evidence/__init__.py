"""What is known and what was measured.

facts     published figures (facts.toml, configs.toml) and their sources (sources.toml)
claims    the article's claims and their verdicts (claims.toml)
cost      FLOPs, rates and peaks, from a config
stored    a recorded measurement's file: parameters, versions, code, witness
results   recorded measurements, and whether the code that made them is still the same
frames    a recorded measurement as a tidy pandas frame; paired comparisons of its arms
rerecord  records a notebook's measurements anew, one arm and seed at a time

`facts` imports `helpers.checks` only, so that every room may ask for a figure. `cost`
and `results` stand above `v3` and `training`.
"""
