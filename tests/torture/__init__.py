"""Trials too long for every change: `python -m tests.torture`; a short seeded run of them is a test.

A wrong answer that nobody notices is the worst that a server of models can do, and looking for it where one
expects it does not find it. So the graphs are random, the inputs are random and at the edges of their types,
and ONNX Runtime in this process, asked for each row alone, is the judge.
"""
