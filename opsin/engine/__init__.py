"""Many requests, one model: scheduler, runner, sampler and the loop that turns requests into
events.
"""
