"""What a notebook shows and asks.

figures      the one look of all figures, curves with bands, pictures with alt text
widgets      a slider above a figure that is drawn anew
parameters   the check in the cell after a notebook's parameters
texts        texts of the reasoning task in colours

Imports from `helpers.checks`; `texts` also from `helpers.reasoning`. Nothing but
notebooks imports from here: what computes does not draw. `figures` sets matplotlib's
defaults when it is imported.
"""
