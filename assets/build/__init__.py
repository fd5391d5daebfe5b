"""Scripts that train the shipped tiny models; each runs alone, resumes after a kill, and ends with a card.

Working state (checkpoints, caches) lives in `.work/` beside this file and is never committed.
"""
