"""From a question to the runs that answer it: designs, arms, equal budgets, rates, ids, costs, and the study's record.

Nothing here trains, but for the seconds in which `throughput` measures how fast this machine is.
"""
