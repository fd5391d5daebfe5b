"""Evidence: the same prompts from the same noise, before and after, scored, compared and shown.

`compare.py` samples, scores and writes; `statistics.py` is the arithmetic of paired comparisons (pure arrays, no I/O);
`grid.py` draws grid.png; `report.py` with the template `report.html` makes the page and report.json; `prompts.py` reads
prompt lists. Rewards come in as `mmalign.reward.Scorer`; nothing here knows one by name. To add a number to the report,
add a field to `statistics.Comparison`: report.json carries it by itself, the page's summary table needs a column.
"""
