"""Whether the rows of a model's inputs stand alone, read off its graph.

Requests of different clients may share a run only if none can change another's answer. Trying alone cannot
show that: inputs that would tell may be rare. So the graph is read. From the first axis of each input the
rows are followed through the operators, by a table that has a rule for each (`layout`, `compute`), to the
first axis of each output. An operator that is not in the table, or that makes one of several rows, or counts
them, ends it, and its name is the reason.

What is read is what the file says; that the runtime does the same is measured besides (`batching`). Belongs
to the worker; uses `runtimes.onnx_graph` and nothing else. Runs on Python 3.10 too.
"""

from edged.row_independence.walk import Reading, changes, read_rows

__all__ = ["Reading", "changes", "read_rows"]
