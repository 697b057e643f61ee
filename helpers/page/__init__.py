"""What a notebook shows and asks.

figures      the one look of all figures, pictures with alt text
charts       curves over seeds, paired differences, bars, heat maps, Gantt: a call each
tables       a pandas frame with formats and a caption
predict      a question that takes a guess, and how far off it was
widgets      a slider above a figure that is drawn anew
parameters   the check in the cell after a notebook's parameters
texts        texts of the reasoning task in colours

Imports from `helpers.checks`; `texts` also from `helpers.reasoning`. Nothing but
notebooks imports from here: what computes does not draw. `figures` sets matplotlib's
defaults when it is imported.
"""
