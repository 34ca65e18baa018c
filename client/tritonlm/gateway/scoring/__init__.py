"""Scores, rankings and decisions from the likelihoods of texts. It knows their formats and formulas, not HTTP."""
