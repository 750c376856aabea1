"""Inference engines: llama.cpp servers, one for each device of the machine, and who gets a place on which.

``device`` says what a device is and ``options`` how servers are started; ``choice`` decides, without a clock or a
process, which device serves a request; ``server`` keeps one child process up; ``pool`` puts these together.
"""
