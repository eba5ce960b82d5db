"""Grids of runs, their stored results, and the tables and figures made from them."""
